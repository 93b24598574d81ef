"""Tests of real trainings of a tiny UperNet by two processes, and of train_segmentor.py as users run it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.dense_jobs import folder_name, run_jobs
from helpers.dense_runs import (
    ROOT,
    ended_with,
    evaluations,
    last_checkpoint,
    launch,
    logged,
    parameter_groups,
    write_engines,
)
from helpers.processes import Processes
from helpers.tiny_ade import make_ade
from safetensors.torch import load_file, save_file

from pretrain.models.vit import ViT

pytestmark = pytest.mark.engine

HELPERS = Path(__file__).parents[1] / "helpers"
CONFIG, LINEAR = HELPERS / "tiny_upernet.py", HELPERS / "tiny_linear.py"
ENGINES = ("plain", "zero1", "zero2", "zero3")
REJECTED = {
    "tta": (["test=FOLDER/plain", "tta=true", "tta_model=None"], "tta=true needs tta_model and tta_pipeline"),
    "another model": (["test=FOLDER/plain", "model.decode_head.channels=8"], "does not match the model: decode_head."),
    "frozen noise": (["model.backbone.frozen=true"], "would freeze random weights: give start.checkpoint=FILE"),
    "labels": (['classes=["ground", "disc"]'], "labels 2 in masks 0000"),
    "another encoder": (["start.checkpoint=FOLDER/encoder.safetensors", "model.backbone.position=sincos"],
                        "has relative tables (LoMaR's), but model.backbone.position is sincos"),
}  # fmt: skip


WITHOUT_DROPOUT = [
    "model.decode_head.dropout_ratio=0",
    "model.auxiliary_head.dropout_ratio=0",
    "model.backbone.drop_path_rate=0",
]


def encoder_file(folder: Path) -> Path:
    torch.manual_seed(0)
    encoder = ViT("vit_tiny", 16, (14, 14))
    facts = {"arch": "vit_tiny", "patch_size": "16", "image_size": "224x224", "position": "relative"}
    save_file(encoder.state_dict(), folder / "encoder.safetensors", facts)
    return folder / "encoder.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, start_once: Callable[..., Processes]) -> Path:
    """Run all jobs and return the parent of their run folders."""
    root = tmp_path_factory.mktemp("jobs")
    make_ade(root / "data")
    encoder = f"start.checkpoint={encoder_file(root)}"
    engine = write_engines(root)
    short = ["train_cfg.max_iters=2", "train_cfg.val_interval=2", "default_hooks.checkpoint.interval=2"]
    jobs: dict[str, list[str]] = {"two": [*WITHOUT_DROPOUT, *short, *engine["zero2"]]}
    # ZeRO-3 is last: it permanently replaces torch's linear layer in a process by one that rounds differently.
    for name, rank in (("plain", 1), ("zero1", None), ("zero2", None), ("zero3", 0)):
        jobs[name] = [encoder, *engine[name]]
        if rank is not None:
            jobs[f"{name} stopped"] = [encoder, *engine[name], f"signal=2,{rank}"]
            jobs[f"{name} continued"] = [encoder, *engine[name], f"name={name}-stopped"]
    jobs["bf16"] = [encoder, *short, *engine["zero1"], "train.precision=bf16"]
    jobs["tested"] = [f"test={root}/zero3"]
    jobs["augmented"] = [f"test={root}/plain", "tta=true"]
    for name in ("plain", "zero3"):
        jobs[f"frozen {name}"] = [encoder, *short, *engine[name], "model.backbone.frozen=true"]
    jobs["linear"] = [f"config={LINEAR}", encoder, *short, *engine["zero2"]]
    for name, (overrides, _) in REJECTED.items():
        jobs[f"refused {name}"] = [override.replace("FOLDER", str(root)) for override in overrides]
    run_jobs(start_once, root, jobs, CONFIG, "segment")
    return root


def assert_same_weights(first: dict[str, Any], second: dict[str, Any], rtol: float = 0.0, atol: float = 0.0) -> None:
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for name, tensor in first["state_dict"].items():
        torch.testing.assert_close(tensor, second["state_dict"][name], msg=name, rtol=rtol, atol=atol)


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_zero_trains_like_the_plain_runner(folder: Path, engine: str):
    plain, zero = last_checkpoint(folder / "plain"), last_checkpoint(folder / engine)
    for name in ("loss", "decode.loss_ce", "aux.loss_ce"):
        assert len(logged(plain, name)) == 4
        assert len(set(logged(plain, name))) == 4
        assert logged(zero, name) == pytest.approx(logged(plain, name), rel=1e-5)
    assert_same_weights(zero, plain, rtol=1e-4, atol=1e-5)
    (row,), (expected,) = evaluations(folder / engine), evaluations(folder / "plain")
    assert row["mIoU"] == pytest.approx(expected["mIoU"], abs=0.5)
    assert {"mIoU", "mAcc", "aAcc"} < row.keys()


@pytest.mark.parametrize("name", ["plain", "zero3"])
def test_stopped_training_continues_bitwise_identically(folder: Path, name: str):
    message = "SIGUSR1: saved and stopped after step 3 of 4; run the same command again to continue"
    assert ended_with(folder, f"{name} stopped") == message
    assert ended_with(folder, f"{name} continued") == ""
    uninterrupted, resumed = last_checkpoint(folder / name), last_checkpoint(folder / f"{name}-stopped")
    assert logged(resumed, "loss") == logged(uninterrupted, "loss")
    assert_same_weights(resumed, uninterrupted, rtol=0, atol=0)
    assert evaluations(folder / f"{name}-stopped") == evaluations(folder / name)


def test_bf16_keeps_fp32_weights(folder: Path):
    content, fp32_loss = last_checkpoint(folder / "bf16"), logged(last_checkpoint(folder / "plain"), "loss")[0]
    assert {tensor.dtype for tensor in content["state_dict"].values() if tensor.is_floating_point()} == {torch.float32}
    assert logged(content, "loss")[0] == pytest.approx(fp32_loss, rel=0.02)
    assert logged(content, "loss")[0] != fp32_loss


def test_checkpoint_evaluates_as_in_training(folder: Path):
    """ZeRO-3's training evaluates a copy gathered from all ranks. Here, mmengine's Runner loads the checkpoint."""
    (log,) = (folder / "tested").glob("*/*.json")
    tested = json.loads(log.read_text().splitlines()[-1])
    (row,) = evaluations(folder / "zero3")
    assert [tested[name] for name in ("mIoU", "mAcc", "aAcc")] == [row[name] for name in ("mIoU", "mAcc", "aAcc")]


def test_test_time_augmentation_changes_the_result(folder: Path):
    assert ended_with(folder, "augmented") == ""
    (log,) = (folder / "augmented").glob("*/*.json")
    (row,) = evaluations(folder / "plain")
    augmented = json.loads(log.read_text().splitlines()[-1])
    assert 0 < augmented["aAcc"] <= 100
    assert augmented["aAcc"] != row["aAcc"]


@pytest.mark.parametrize("name", ["frozen plain", "frozen zero3", "linear"])
def test_frozen_encoder_does_not_change(folder: Path, name: str):
    """The encoder is saved as it was loaded, and the optimizer has only the other parameters."""
    content = last_checkpoint(folder / folder_name(name))
    encoder = load_file(folder / "encoder.safetensors")
    state = content["state_dict"]
    kept = {key.removeprefix("backbone."): tensor for key, tensor in state.items() if key.startswith("backbone.")}
    assert kept.keys() == encoder.keys()
    for key, tensor in kept.items():
        assert torch.equal(tensor, encoder[key]), key
    assert {group["lr_scale"] for group in parameter_groups(folder / folder_name(name))} == {1.0}
    assert len(set(logged(content, "loss"))) == 2


def test_zero_trains_the_head_of_a_frozen_encoder_like_the_plain_runner(folder: Path):
    plain, zero = last_checkpoint(folder / "frozen-plain"), last_checkpoint(folder / "frozen-zero3")
    assert logged(zero, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    assert_same_weights(zero, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", REJECTED)
def test_rejected_job_reports_the_reason(folder: Path, name: str):
    message = ended_with(folder, f"refused {name}")
    assert REJECTED[name][1] in message


def test_one_and_two_ranks_train_alike(folder: Path):
    """Two ranks with two images each train like one with all four, because norms are synchronized across ranks.

    Dropout and drop path, which are random on each rank, are off. The single rank runs the script as a user would.
    """
    short = ["train_cfg.max_iters=2", "train_cfg.val_interval=2", "default_hooks.checkpoint.interval=2"]
    overrides = [*WITHOUT_DROPOUT, *short, "data_root=data", "runs=.", "name=one", "train_dataloader.batch_size=4"]
    script = str(ROOT / "downstream/segment/train_segmentor.py")
    done = launch(sys.executable, script, str(CONFIG), *overrides, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 ranks x train_dataloader.batch_size=4 x optim_wrapper.accumulative_counts=1 = 4 images" in done.stdout
    assert_same_weights(last_checkpoint(folder / "two"), last_checkpoint(folder / "one"), rtol=1e-3, atol=2e-5)
    assert {"mIoU", "mAcc", "aAcc"} < evaluations(folder / "one")[0].keys()
