"""Tests of real trainings of a small Mask R-CNN by two processes that compare ZeRO with mmengine's Runner."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.dense_jobs import CONFIG, folder_name, run_jobs
from helpers.dense_runs import (
    ended_with,
    evaluations,
    last_checkpoint,
    logged,
    parameter_groups,
    write_engines,
)
from helpers.processes import Processes
from helpers.tiny_coco import make_coco

pytestmark = pytest.mark.engine

# Four optimizer steps of two micro-batches each, in two epochs. Gradients are clipped in every step.
STEPS = ["optim_wrapper.accumulative_counts=2", "optim_wrapper.clip_grad={'max_norm': 0.5}"]
ENDLESS = [
    "train_cfg={'type': 'IterBasedTrainLoop', 'max_iters': 6, 'val_interval': 6}",
    "train_dataloader.sampler.type=InfiniteSampler",
    "train_dataloader.num_workers=0",
    "train_dataloader.persistent_workers=False",
    "default_hooks.checkpoint.interval=6",
]
# Half of the images have no objects, so the ranks call different modules of the heads.
EMPTY = [
    "train_dataloader.dataset.ann_file=annotations/half.json",
    "train_dataloader.dataset.filter_cfg.filter_empty_gt=False",
]
REJECTED = {
    "engine": ("zero2", [], "was trained with train.ds_config=: continue it the same way"),
    "no engine": ("plain", ["train.ds_config=zero2"], "was trained without train.ds_config=: continue it the same way"),
    "another engine": ("zero2", ["train.ds_config=zero3"], "train.ds_config was 'ZeRO 2' and is 'ZeRO 3'"),
    "another batch": ("plain", ["train_dataloader.batch_size=2"], "train_dataloader.batch_size was 1 and is 2"),
    "another rate": ("plain", ["optim_wrapper.optimizer.lr=1e-4"], "optim_wrapper.optimizer was"),
    "another schedule": ("zero2", ["train.ds_config=zero2", "param_scheduler.1.milestones=[2]"], "param_scheduler was"),
    "another model": ("new", ["test=FOLDER/plain", "model.neck.out_channels=16"], "does not match the model: neck."),
    "a pickle": ("new", ["test=FOLDER/pickle.pth"], "holds posix.system, which could run code"),
    "a damaged file": ("new", ["load_from=FOLDER/cut_off.pth"], "is truncated, damaged or not a checkpoint"),
    "no file": ("new", ["test=FOLDER/nowhere"], "nowhere is not a checkpoint: give a .pth file"),
    "stage 0": ("new", ["train.ds_config=zero0"], "leave out train.ds_config"),
    "a key of ours": ("new", ["train.ds_config=FOLDER/owned.json"], "delete it there and set optim_wrapper.clip_grad"),
    "clipping": (
        "new",
        ["train.ds_config=zero1", "optim_wrapper.clip_grad={'type': 'value', 'clip_value': 1}"],
        "only by their L2 norm",
    ),
    "bf16": (
        "new",
        ["train.precision=bf16"],
        "mmengine's bf16 needs a GPU: give train.precision=fp32, or train.ds_config=zero1",
    ),
    "averages": ("new", ["config=FOLDER/averaged.py", "train.ds_config=zero2"], "EMAHook needs mmengine's Runner"),
    "a new train_cfg": ("new", ["train_cfg={'max_epochs': 1}"], "override its keys one by one"),
    "accumulation": ("new", ["optim_wrapper.accumulative_counts=5"], "an epoch has 4 batches per rank, fewer than"),
    "iterations": ("new", [*ENDLESS, "optim_wrapper.accumulative_counts=4"], "train_cfg.max_iters=6 is not a multiple"),
}


class Evil:
    def __reduce__(self) -> Any:
        import os

        return os.system, ("false",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, start_once: Callable[..., Processes]) -> Path:
    """Run all jobs and return the parent of their run folders."""
    root = tmp_path_factory.mktemp("jobs")
    make_coco(root / "data")
    annotations = root / "data" / "annotations"
    half = json.loads((annotations / "instances_train2017.json").read_text())
    half["annotations"] = [row for row in half["annotations"] if row["image_id"] % 2]
    (annotations / "half.json").write_text(json.dumps(half))
    (root / "owned.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}))
    torch.save({"state_dict": {}, "meta": Evil()}, root / "pickle.pth")
    torch.save({"state_dict": {"a": torch.ones(1000)}}, root / "cut_off.pth")
    (root / "cut_off.pth").write_bytes((root / "cut_off.pth").read_bytes()[:1000])

    (root / "averaged.py").write_text(
        f"_base_ = {str(CONFIG)!r}\ncustom_hooks = [dict(type='EMAHook', momentum=0.1)]\n"
    )

    engine = write_engines(root)
    predictions = [f"val_evaluator.outfile_prefix={root}/val"]
    short = ["train_cfg.max_epochs=1"]
    jobs = {name: [*STEPS, *engine[name]] for name in ("plain", "zero1", "zero2")}
    jobs |= {"zero3": [*STEPS, *engine["zero3"], *predictions]}
    for name, when in {"plain": "4,1", "zero2": "4,0", "zero3": "3,1"}.items():
        jobs[f"{name} stopped"] = [*STEPS, *engine[name], f"signal={when}"]
        jobs[f"{name} continued"] = [*STEPS, *engine[name], f"name={name}-stopped"]
    endless = [f"config={root}/averaged.py", *ENDLESS]
    jobs["endless"] = endless
    jobs["endless stopped"] = [*endless, "signal=2,1"]
    jobs["endless continued"] = [*endless, "name=endless-stopped"]
    jobs["zero2 from plain"] = [*short, *engine["zero2"], f"load_from={root}/plain"]
    jobs["plain from zero3"] = [*short, f"load_from={root}/zero3/epoch_2"]
    jobs["zero3 tested"] = [f"test={root}/zero3", f"test_evaluator.outfile_prefix={root}/test"]
    jobs["bf16"] = [*short, *engine["zero1"], "train.precision=bf16"]
    for name in ("plain", "zero1", "zero2", "zero3"):
        jobs[f"{name} empty"] = [*short, *engine[name], *EMPTY]
    keep = "default_hooks.checkpoint.max_keep_ckpts=1"
    jobs["plain full"] = ["train_cfg.max_epochs=3", keep, "full=8,0"]
    jobs["zero2 full"] = ["train_cfg.max_epochs=3", keep, "full=8,1", *engine["zero2"]]
    for name, (run_name, overrides, _) in REJECTED.items():
        overrides = [override.replace("FOLDER", str(root)) for override in overrides]
        jobs[f"refused {name}"] = [*(STEPS if run_name != "new" else []), f"name={run_name}", *overrides]
    run_jobs(start_once, root, jobs)
    return root


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_zero_trains_like_the_plain_runner(folder: Path, engine: str):
    plain, zero = last_checkpoint(folder / "plain"), last_checkpoint(folder / engine)
    assert len(logged(plain, "loss")) == 8
    assert logged(zero, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    assert len(logged(plain, "grad_norm")) == 4
    assert min(logged(plain, "grad_norm")) > 0.5  # all steps are clipped
    assert logged(zero, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-5)
    assert logged(zero, "lr") == logged(plain, "lr")
    assert zero["state_dict"].keys() == plain["state_dict"].keys()
    for name, tensor in plain["state_dict"].items():
        torch.testing.assert_close(zero["state_dict"][name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_zero_trains_on_images_without_objects(folder: Path, engine: str):
    """ZeRO's buckets need gradients to become ready in the same order on all ranks, whatever their images."""
    plain, zero = (logged(last_checkpoint(folder / f"{name}-empty"), "loss") for name in ("plain", engine))
    assert len(plain) == 4
    assert zero == pytest.approx(plain, rel=1e-5)


def test_groups_keep_their_learning_rates(folder: Path):
    """The heads' learning rate is always half the base rate, and ZeRO has no group of frozen parameters."""
    for engine in ("plain", "zero1", "zero2", "zero3"):
        found = parameter_groups(folder / engine)
        scales = [1.0, 2.0, 0.5] if engine == "plain" else [1.0, 0.5]
        assert [group["lr"] for group in found] == pytest.approx([5e-4 * scale for scale in scales]), engine
        assert [group["initial_lr"] for group in found] == pytest.approx([1e-3 * scale for scale in scales]), engine


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plain", "SIGUSR1: saved and stopped after step 6 of 8"),
        ("zero2", "SIGUSR1: saved and stopped after step 6 of 8"),
        ("zero3", "SIGUSR1: saved and stopped after step 4 of 8"),
        ("endless", "SIGUSR1: saved and stopped after step 3 of 6"),
    ],
)
def test_stopped_training_continues_bitwise_identically(folder: Path, name: str, message: str):
    """Runs stop within an epoch, at its end, and in an endless data order with a moving average of the weights.

    All of them use random augmentation.
    """
    assert ended_with(folder, f"{name} stopped") == f"{message}; run the same command again to continue"
    assert ended_with(folder, f"{name} continued") == ""
    uninterrupted, resumed = last_checkpoint(folder / name), last_checkpoint(folder / f"{name}-stopped")
    for scalar in ("loss", "loss_mask", "lr"):
        assert logged(resumed, scalar) == logged(uninterrupted, scalar)
    assert (resumed["meta"]["epoch"], resumed["meta"]["iter"]) == (
        uninterrupted["meta"]["epoch"],
        uninterrupted["meta"]["iter"],
    )
    assert ("ema_state_dict" in uninterrupted) == (name == "endless")
    for part in uninterrupted.keys() & {"state_dict", "ema_state_dict"}:
        for key, tensor in uninterrupted[part].items():
            assert torch.equal(tensor, resumed[part][key]), key
    rows = evaluations(folder / f"{name}-stopped")
    # Each evaluation runs once, including the one that a stop at the end of an epoch prevented at first.
    assert [row["iter"] for row in rows] == ([6] if name == "endless" else [4, 8])


def test_augmentations_differ_between_epochs(folder: Path):
    """Otherwise, bitwise identical results would prove little."""
    content = last_checkpoint(folder / "plain")
    assert len(set(logged(content, "loss_rpn_bbox"))) == 8


def test_zero_and_the_plain_runner_load_each_others_weights(folder: Path):
    zero, plain = (last_checkpoint(folder / folder_name(job)) for job in ("zero2 from plain", "plain from zero3"))
    assert logged(zero, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-4)  # the weights are nearly the same
    assert (
        abs(logged(zero, "loss")[0] - logged(last_checkpoint(folder / "plain"), "loss")[0]) > 0.1
    )  # and not the initial ones


def test_zero3_predictions_match_those_of_its_checkpoint(folder: Path):
    """Training evaluates a copy gathered from the ranks' partitions, and mmengine's Runner loads the checkpoint."""
    assert ended_with(folder, "zero3 tested") == ""
    for kind in ("bbox", "segm"):
        first, second = (json.loads((folder / f"{run}.{kind}.json").read_text()) for run in ("val", "test"))
        assert len(first) >= 10
        assert first == second


def test_bf16_keeps_fp32_weights(folder: Path):
    content = last_checkpoint(folder / "bf16")
    assert {tensor.dtype for tensor in content["state_dict"].values() if tensor.is_floating_point()} == {torch.float32}
    fp32_loss = logged(last_checkpoint(folder / "plain"), "loss")[0]
    assert logged(content, "loss")[0] == pytest.approx(fp32_loss, rel=0.02)
    assert logged(content, "loss")[0] != fp32_loss


@pytest.mark.parametrize("name", ["plain", "zero2"])
def test_full_disk_keeps_the_previous_checkpoint(folder: Path, name: str):
    """With `max_keep_ckpts=1`, the second checkpoint replaces the first, and the third cannot be written."""
    message = ended_with(folder, f"{name} full")
    assert "epoch_3" in message
    assert "could not be written" in message
    work_dir = folder / f"{name}-full"
    assert last_checkpoint(work_dir)["meta"]["epoch"] == 2
    assert sorted(p.name.removesuffix(".pth") for p in work_dir.glob("epoch_*")) == ["epoch_2"]


@pytest.mark.parametrize("name", REJECTED)
def test_rejected_job_prints_one_line(folder: Path, name: str):
    message = ended_with(folder, f"refused {name}")
    assert REJECTED[name][2] in message
    assert "\n" not in message
