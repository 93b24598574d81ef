"""A run warns at its start about settings that would hardly train anything."""

import platform
import re
from pathlib import Path

import pytest
import torch

from downstream.classify.config import load as load_finetune
from pretrain.config import RECIPES, load
from pretrain.trainer import cautions as module
from pretrain.trainer.cautions import cautions, has_fast_bf16

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def warnings_for(*overrides: str, recipe: str = "mae_vitb16_224_1600e", samples: int = 1_281_167) -> str:
    config = load(recipe, ["data.shards=/nowhere", *overrides])
    return "\n".join(cautions(config, samples, samples // config.train.global_batch_size, GPU))


def test_learning_rate_too_small_for_a_small_batch_suggests_base_lr():
    text = warnings_for("train.global_batch_size=16")
    assert text.startswith("the learning rate is only 9.4e-06: optim.base_lr=0.00015 is for a batch of 256 and scales")
    suggestion = re.search(r"or (optim\.base_lr=\S+) for square-root scaling", text)
    assert suggestion is not None
    assert warnings_for("train.global_batch_size=16", suggestion[1]) == ""


def test_too_few_steps_per_epoch_suggest_a_smaller_batch():
    text = warnings_for(samples=5000)
    assert (
        "5000 samples in batches of 4096 make only 1 steps per epoch, 1600 in all, and each epoch leaves out 904"
        in text
    )
    suggestion = re.search(r"train\.global_batch_size=\d+", text)
    assert suggestion is not None
    assert warnings_for(suggestion[0], "optim.base_lr=1e-3", samples=5000) == ""


@pytest.mark.parametrize("samples", [1, 7, 8])
def test_too_few_samples_for_eight_steps_are_reported(samples: int):
    text = warnings_for("train.global_batch_size=1", samples=samples)
    assert (f"{samples} samples in batches of 1 make only" in text) == (samples < 8)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml") if "beit" not in path.stem))
def test_shipped_recipes_cause_no_warning(name: str):
    samples = {"quickstart": 351}.get(name, 5000 if name.endswith("_small") else 1_281_167)
    assert warnings_for(recipe=name, samples=samples) == ""


def test_fine_tuning_with_one_image_per_step_is_reported():
    config = load_finetune(
        "finetune_small_vits16_224_100e", ["data.shards=x", "val.shards=x", "train.global_batch_size=1"]
    )
    assert [text.split(":")[0] for text in cautions(config, 5000, 5000, GPU)] == ["the learning rate is only 2e-06"]


@pytest.mark.parametrize(("fast", "precision", "expected"), [(False, "bf16", 1), (False, "fp32", 0), (True, "bf16", 0)])
def test_bf16_on_a_cpu_without_it_is_reported(
    fast: bool, precision: str, expected: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "has_fast_bf16", lambda device: fast)
    config = load("mae_vitb16_224_1600e", ["data.shards=/nowhere", f"train.precision={precision}"])
    found = [text for text in cautions(config, 1_281_167, 312, CPU) if "train.precision=fp32" in text]
    assert len(found) == expected


def test_gpus_have_fast_bf16():
    assert has_fast_bf16(GPU)


@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").is_file(), reason="needs Linux on x86")
def test_only_cpus_with_avx_512_have_fast_bf16():
    assert has_fast_bf16(CPU) == ("avx512bw" in Path("/proc/cpuinfo").read_text())
