"""A run whose images grow (`data.size_schedule`), on real engines."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.rank_checks import assert_same_bits, assert_same_run
from safetensors.torch import load_file

from pretrain.trainer.metrics import read_metrics

pytestmark = pytest.mark.engine
TWENTY_STEPS = ("train.epochs=2", "train.ds_config=zero1", "train.gradient_accumulation_steps=2")
GROWING = "data.size_schedule=0:48x64,1:64x80"  # from step 10 on
# LUT's teacher sees the images as well, and its heads have buffers that every step changes.
SETTINGS = (*TWENTY_STEPS, "lut.hidden_dim=16", "model.position=sincos", "checkpoint.keep_last=4")


@pytest.fixture(scope="module")
def whole(
    write_recipe: Callable[..., Path], start_once: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """whole('key=value', ...) -> the folder of a complete run. All tests share it, and write only to copies."""

    @functools.cache
    def run(*overrides: str) -> Path:
        recipe = write_recipe(tmp_path_factory.mktemp("whole"), "whole")
        (recipe.parent / "said.txt").write_text(start_once(recipe, *SETTINGS, *overrides).finish())
        return recipe.parent / "runs" / "whole"

    return run


@pytest.mark.parametrize("step", [5, 10, 15])
def test_resume_before_at_and_after_the_change_is_bitwise_identical(
    step: int, whole: Callable[..., Path], recipe: Path, start: Callable[..., Any], tmp_path: Path
):
    later = [f"step_{other:08d}" for other in (5, 10, 15, 20) if other > step]
    broken = tmp_path / "runs" / "broken"
    shutil.copytree(whole(GROWING), broken, ignore=shutil.ignore_patterns(*later, "encoder*.safetensors"))
    assert f"resumes from step_{step:08d}" in start(recipe, *SETTINGS, GROWING, "name=broken").finish()
    assert_same_run(whole(GROWING), broken)


def test_image_size_is_logged(whole: Callable[..., Path]):
    rows = read_metrics(whole(GROWING) / "metrics.jsonl")
    assert [row["image_size"] for row in rows] == ["48x64"] * 10 + ["64x80"] * 10
    output = (whole(GROWING).parents[1] / "said.txt").read_text()
    assert "at 48x64, 64x80 from epoch 1 on" in output
    assert "from step 10 on, images are 64x80" in output


def test_schedule_of_one_size_is_bitwise_identical_to_none(whole: Callable[..., Path]):
    constant, plain = whole("data.size_schedule=0:64x80"), whole()
    for name in ("encoder.safetensors", "encoder_ema.safetensors"):
        assert_same_bits(*(load_file(folder / name) for folder in (constant, plain)))
    losses = [
        [(row["loss"], row["grad_norm"]) for row in read_metrics(run / "metrics.jsonl")] for run in (constant, plain)
    ]
    assert losses[0] == losses[1]
    assert "image_size" not in read_metrics(plain / "metrics.jsonl")[0]


def test_resume_with_another_schedule_is_rejected(
    whole: Callable[..., Path], recipe: Path, start: Callable[..., Any], tmp_path: Path
):
    shutil.copytree(whole(GROWING), tmp_path / "runs" / "tiny")
    output = "".join(start(recipe, *SETTINGS, "data.size_schedule=0:64,1:64x80").outputs())
    assert "data.size_schedule was '0:48x64,1:64x80' and is '0:64,1:64x80'" in output
