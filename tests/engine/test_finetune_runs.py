"""Real runs of `downstream/classify/finetune.py` on JPEGs: killed and resumed, on other ranks, and rejected."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.processes import CLASSIFY, ROOT, SMALL
from helpers.rank_checks import assert_same_run, newest, wait_for
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from pretrain.build import build_method
from pretrain.config import load
from pretrain.finish import save_encoder
from pretrain.trainer.metrics import read_metrics

pytestmark = pytest.mark.engine
# An even number of classes: ZeRO-3 pads the parts of an odd number with uninitialized memory.
COLORS = {"blue": (40, 60, 200), "green": (60, 180, 50), "red": (210, 50, 40), "yellow": (220, 210, 60)}


def write_images(folder: Path, count: int, seed: int) -> Path:
    """Writes `count` noisy images of each color, in a folder per color, which is their class."""
    rng = np.random.default_rng(seed)
    for name, color in COLORS.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(color + rng.normal(0, 40, (72, 88, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02d}.jpg", quality=90)
    return folder


def pack(folder: Path, count: int, seed: int) -> Path:
    """Writes such images and packs them into shards."""
    images = write_images(folder / "images", count, seed)
    command = [sys.executable, "-m", "data.pack", str(images), str(folder / "shards")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder / "shards"


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory, write_recipe: Callable[..., Path]) -> Path:
    """A recipe with every option on, next to its shards and a LoMaR encoder: three epochs of five steps."""
    folder = tmp_path_factory.mktemp("tuning")
    pretraining = load(str(write_recipe(folder, "pretraining")), ["data.image_size=[64,96]"])
    with SMALL:
        encoder = build_method(pretraining).encoder.state_dict()
        save_encoder(encoder, pretraining, folder / "encoder.safetensors", pretraining.train.epochs)
    keys = {
        "name": "tuned",
        "runs": "runs",
        "model": {"arch": "vit_tiny", "drop_path_rate": 0.1},
        "data": {"shards": str(pack(folder / "train", 11, seed=0)), "image_size": [64, 80], "num_workers": 1},
        "start": {"checkpoint": str(folder / "encoder.safetensors")},
        "val": {"shards": str(write_images(folder / "val", 7, seed=1)), "batch_size": 4},
        "augment": {
            "randaugment": "rand-m9-mstd0.5-inc1",
            "mixup": 0.8,
            "cutmix": 1.0,
            "random_erasing": 0.25,
            "label_smoothing": 0.1,
        },
        "ema": {"decay": 0.8},
        "optim": {"base_lr": 1e-2, "warmup_epochs": 1, "betas": [0.9, 0.999], "layer_decay": 0.75},
        "train": {"epochs": 3, "global_batch_size": 8, "precision": "bf16", "ds_config": "zero3"},
        "checkpoint": {"every_steps": 5},
        "log": {"every_steps": 1},
    }
    (folder / "tuned.yaml").write_text(yaml.safe_dump(keys))
    return folder / "tuned.yaml"


@pytest.fixture(scope="module")
def whole(tuning: Path, start_once: Callable[..., Any]) -> Path:
    output = start_once(tuning, f"runs={tuning.parent}", "name=whole", script=CLASSIFY).finish()
    assert "encoder.safetensors" in output, "what became of the start is logged"
    return tuning.parent / "whole"


def test_killed_run_resumes_bitwise_identically(tuning: Path, whole: Path, start: Callable[..., Any], tmp_path: Path):
    """Even if the starting encoder is gone by then. How often the run is evaluated changes nothing."""
    encoder = tuning.parent / "encoder.safetensors"
    killed = start(tuning, "val.every_epochs=3", script=CLASSIFY)
    wait_for(tmp_path / "runs" / "tuned" / "checkpoints" / "step_00000005" / "manifest.json", killed)
    killed.kill()
    assert not (tmp_path / "runs" / "tuned" / "model.safetensors").exists(), "the run ended before it was killed"
    last = newest(tmp_path / "runs" / "tuned")
    assert last <= "step_00000010"
    encoder.rename(tmp_path / encoder.name)
    output = start(tuning, "val.every_epochs=3", script=CLASSIFY).finish()
    assert f"resumes from {last}" in output
    assert "from scratch" not in output
    (tmp_path / encoder.name).rename(encoder)
    assert_same_run(whole, tmp_path / "runs" / "tuned")
    (measured,) = read_metrics(tmp_path / "runs" / "tuned" / "evaluation.jsonl")
    assert measured == read_metrics(whole / "evaluation.jsonl")[-1]


def test_run_writes_its_files_and_evaluations(whole: Path):
    assert {p.name for p in whole.iterdir()} == {
        ".lock",
        "checkpoints",
        "config.yaml",
        "environment.json",
        "evaluation.jsonl",
        "logs",
        "loss.png",
        "metrics.jsonl",
        "model.safetensors",
        "model_ema.safetensors",
        "tensorboard",
    }
    measured = read_metrics(whole / "evaluation.jsonl")
    assert [row["step"] for row in measured] == [5, 10, 15]
    for row in measured:
        for name in ("top1", "ema_top1"):
            assert (row[name] * 28) == pytest.approx(round(row[name] * 28)), "a share of the 28 images"
        assert row["top5"] == row["ema_top5"] == 1, "of four classes"
    online, averaged = (load_file(whole / f"{name}.safetensors") for name in ("model", "model_ema"))
    assert online.keys() == averaged.keys()
    assert online["head.weight"].shape == (4, 32), "the classes are those of the data"
    with safe_open(whole / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["class_names"]) == list(COLORS)
    assert not torch.equal(online["head.weight"], averaged["head.weight"])
    assert json.loads((whole / "environment.json").read_text())["deepspeed"]["zero_stage"] == 3


def test_layer_decay_run_resumes_on_other_ranks_and_stage(tuning: Path, start: Callable[..., Any], tmp_path: Path):
    """Without random draws per rank. Those of the data workers are per sample. The classes are learned."""
    no_rank_randomness = (
        "model.drop_path_rate=0",
        "augment.mixup=0",
        "augment.cutmix=0",
        "augment.random_erasing=0",
        "train.precision=fp32",
    )
    keys = (tuning, *no_rank_randomness, "augment.randaugment=rand-m3-mstd0.5-inc1")
    start(*keys, "train.ds_config=zero1", script=CLASSIFY).finish()
    run = tmp_path / "runs" / "tuned"
    before, measured = read_metrics(run / "metrics.jsonl"), read_metrics(run / "evaluation.jsonl")
    assert measured[-1]["top1"] > 0.6
    last = load_file(run / "model.safetensors")
    subprocess.run(["rm", "-r", str(run / "checkpoints" / "step_00000015")], check=True)
    output = start(*keys, "train.ds_config=zero3", script=CLASSIFY, processes=1).finish()
    assert "resumes from step_00000010" in output
    assert "the number of ranks was 2 and is 1, the ZeRO stage (train.ds_config) was 1 and is 3" in output
    after = read_metrics(run / "metrics.jsonl")
    assert [row["loss"] for row in after] == pytest.approx([row["loss"] for row in before], rel=1e-5)
    assert [row["grad_norm"] for row in after] == pytest.approx([row["grad_norm"] for row in before], rel=1e-3)
    for name, tensor in load_file(run / "model.safetensors").items():
        if not name.endswith("qkv.bias"):  # Adam follows rounding errors there
            torch.testing.assert_close(tensor, last[name], rtol=1e-3, atol=1e-4, msg=name)


REJECTED = {
    "a missing split": ("val.shards=/nowhere", "val.shards: /nowhere: no such shard"),
    "labels beyond the classes": (
        "head.num_classes=2",
        "data.shards: 22 of 44 samples in FOLDER/train/shards have no label in 0..1 (head.num_classes=2): "
        "labels range from 0 to 3",
    ),
    "another architecture": (
        "model.arch=vit_small",
        "start.checkpoint: FOLDER/encoder.safetensors is vit_tiny with relative positions; "
        "the encoder is vit_small with relative positions",
    ),
    "a truncated file": (
        "start.checkpoint=FOLDER/cut.safetensors",
        "cut.safetensors (5000 bytes) is truncated, damaged",
    ),
}


def test_bad_input_is_rejected(tuning: Path, start: Callable[..., Any]):
    """One process per case, all in parallel: they do little more than import."""
    folder = tuning.parent
    (folder / "cut.safetensors").write_bytes((folder / "encoder.safetensors").read_bytes()[:5000])
    runs = {
        case: start(tuning, override.replace("FOLDER", str(folder)), f"name=refused{n}", script=CLASSIFY, processes=1)
        for n, (case, (override, _)) in enumerate(REJECTED.items())
    }
    for case, (_, message) in REJECTED.items():
        output = "".join(runs[case].outputs())
        assert runs[case].all[0].returncode == 1, output
        assert message.replace("FOLDER", str(folder)) in output
        assert "Traceback" not in output, output
