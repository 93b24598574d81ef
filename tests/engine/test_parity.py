"""DeepSpeed in every ZeRO stage has the losses and gradient norms of plain torch, with and without accumulation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rank_checks import assert_same_run, assert_same_steps
from helpers.steps import STEPS, configure, plain_steps, run_jobs
from safetensors.torch import load_file

pytestmark = pytest.mark.engine

SETTINGS = [(1, 0.0), (4, 0.0), (2, 0.1)]


@pytest.fixture(scope="module", params=["zero0", "zero1", "zero2", "zero3"])
def stage(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def jobs(stage: str, write_recipe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The recipe and overrides of each setting."""
    recipe = str(write_recipe(tmp_path_factory.mktemp("recipes")))
    engine = f"train.ds_config={stage}"
    settings = {
        f"{accumulation}-{clip}": [
            recipe,
            engine,
            f"train.gradient_accumulation_steps={accumulation}",
            f"optim.clip_grad={clip}",
        ]
        for accumulation, clip in SETTINGS
    }
    with_teacher = write_recipe(tmp_path_factory.mktemp("recipes"), lut={"hidden_dim": 16, "momentum": 0.9})
    if stage != "zero3":
        settings["graphs"] = [recipe, engine, "train.gradient_accumulation_steps=2", "model.cuda_graphs=on"]
    return settings | {"teacher": [str(with_teacher), engine, "train.gradient_accumulation_steps=2"]}


@pytest.fixture(scope="module")
def trained(jobs: dict[str, Any], start_once: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch per stage for all settings. Stages never share a process, since ZeRO-3 patches torch permanently."""
    folder = tmp_path_factory.mktemp("trained")
    run_jobs(start_once, folder, jobs)
    return folder


@pytest.mark.parametrize(("accumulation", "clip"), SETTINGS)
def test_engine_equals_plain_torch(stage: str, accumulation: int, clip: float, jobs: dict[str, Any], trained: Path):
    name = f"{accumulation}-{clip}"
    assert_same_steps(trained / name / "whole", plain_steps(configure(*jobs[name]))[0])
    effective = json.loads((trained / name / "whole" / "effective.json").read_text())
    assert effective["zero_stage"] == int(stage[-1])
    assert effective["gradient_accumulation_steps"] == accumulation
    assert effective["gradient_clipping"] == clip, "DeepSpeed's own default is 1.0"


def test_engine_with_cuda_graphs_equals_plain_torch(stage: str, jobs: dict[str, Any], trained: Path):
    """On a CPU the graphs recompute, so this tests hooks, buckets and several micro-batches."""
    if stage == "zero3":
        pytest.skip("refused in stage 3")
    assert_same_steps(trained / "graphs" / "whole", plain_steps(configure(*jobs["graphs"]))[0])
    assert_same_run(*(trained / "graphs" / name for name in ("whole", "resumed")))


@pytest.mark.parametrize(("accumulation", "clip"), SETTINGS)
def test_four_steps_equal_two_steps_and_two_resumed_ones(accumulation: int, clip: float, trained: Path):
    assert_same_run(*(trained / f"{accumulation}-{clip}" / name for name in ("whole", "resumed")))


def test_teacher_is_updated_only_by_steps_that_moved_the_weights(jobs: dict[str, Any], trained: Path):
    """It is updated in fp32, with batch statistics over both ranks in its heads. The poisoned step does not move it."""
    steps, averages = plain_steps(configure(*jobs["teacher"]))
    assert_same_steps(trained / "teacher" / "whole", steps)
    saved = load_file(trained / "teacher" / "whole" / "checkpoints" / f"step_{STEPS:08d}" / "ema.safetensors")
    assert saved.keys() == averages.keys()
    for name, ema in averages.items():
        assert saved[name].dtype == torch.float32
        parts = [slice(None)]
        if name.endswith("qkv.bias"):  # the key bias does not affect attention: Adam follows rounding errors
            third = len(ema) // 3
            parts = [slice(0, third), slice(2 * third, None)]
        for part in parts:
            # Adam divides by the gradient's magnitude, so rounding matters most where that is nearly 0.
            torch.testing.assert_close(saved[name].double()[part], ema[part], rtol=1e-5, atol=1e-5, msg=name)
    assert_same_run(*(trained / "teacher" / name for name in ("whole", "resumed")))
