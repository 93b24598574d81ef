"""Real runs of the command on a GPU: resuming is bitwise identical, and ZeRO stages give the same results.

Many runs share the GPU at the same time: they are small, and starting takes longer than their steps.
"""

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import Command
from helpers.rank_checks import assert_same_run
from helpers.waiting import SECONDS

from pretrain.trainer.metrics import read_metrics

pytestmark = pytest.mark.cuda

MAE = {"name": "mae", "decoder_embed_dim": 128, "decoder_depth": 2, "decoder_num_heads": 2}
FAST = {
    "method": {"name": "lomar", "num_windows": 2, "mask_token_block": 8},
    "pr_mim": {"throw_ratio": 0.5, "kernel_size": 7},
}
EAGER = {"arch": "vit_tiny", "compile": "off", "cuda_graphs": "off"}
COMPILED = EAGER | {"compile": "on"}
TRAININGS: dict[str, dict[str, Any]] = {
    "lomar": {"model": EAGER},
    "lomar_fast": FAST | {"model": EAGER},
    "mae": {"method": MAE, "model": EAGER | {"position": "sincos"}},
    "compiled": FAST | {"model": COMPILED},
    "graphs": FAST | {"model": EAGER | {"cuda_graphs": "on"}},
}
LONG = "train.epochs=4"
STAGES = ("zero0", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def recipes(
    device: torch.device, write_recipe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: write_recipe(folder, name, **sections) for name, sections in TRAININGS.items()}


@pytest.fixture(scope="module")
def stages(recipes: dict[str, Path], command: Callable[..., Command]) -> dict[str, Command]:
    """A run of LoMaR in each ZeRO stage, and one with CUDA graphs in each stage that allows them."""
    return {
        stage: command(recipes["lomar"], f"train.ds_config={stage[:5]}", f"name={stage}", *keys)
        for stage, keys in {
            **dict.fromkeys(STAGES, ()),
            **{f"{stage}-graphs": ("model.cuda_graphs=on",) for stage in STAGES[:3]},
        }.items()
    }


@pytest.fixture(scope="module")
def killed(recipes: dict[str, Path], command: Callable[..., Command], stages: dict[str, Command]) -> dict[str, Path]:
    """The folders of undisturbed runs; next to each is NAME-killed, killed after a checkpoint and resumed.

    The results of a compiled run depend on the compiler's choices, which are kept in the run's folder: the undisturbed
    run gets a copy of them.
    """
    runs = recipes["lomar"].parent / "runs"
    first = {name: command(recipe, LONG, f"name={name}-killed") for name, recipe in recipes.items()}
    undisturbed = [command(recipe, LONG, f"name={name}") for name, recipe in recipes.items() if name != "compiled"]
    kill_after_a_checkpoint({runs / f"{name}-killed": run for name, run in first.items()})
    again = [command(recipe, LONG, f"name={name}-killed") for name, recipe in recipes.items()]
    for run in again:
        assert re.search(r"resumes from step_000000[0-3]", run.finish())
    shutil.copytree(
        runs / "compiled-killed",
        runs / "compiled",
        ignore=shutil.ignore_patterns("checkpoints", "*.jsonl", "*.safetensors", "*.png", "logs"),
    )
    undisturbed.append(command(recipes["compiled"], LONG, "name=compiled"))
    for run in undisturbed:
        assert "starts at step 0" in run.finish()
    return {name: runs / name for name in recipes}


def kill_after_a_checkpoint(running: dict[Path, Command]) -> None:
    """Kills each run as soon as its folder has a checkpoint."""
    deadline = time.monotonic() + SECONDS
    while running:
        assert time.monotonic() < deadline, f"no checkpoint in {list(running)}"
        for folder, run in list(running.items()):
            assert run.returncode is None, run.outputs()
            if (folder / "checkpoints" / "step_00000005" / "manifest.json").exists():
                run.kill()
                assert not (folder / "encoder.safetensors").exists(), "the run ended before it was killed"
                del running[folder]
        time.sleep(0.002)


@pytest.mark.parametrize("training", TRAININGS)
def test_killed_and_resumed_run_is_bitwise_identical(training: str, killed: dict[str, Path]):
    folder = killed[training]
    assert_same_run(folder, folder.with_name(f"{folder.name}-killed"))


@pytest.mark.parametrize("stage", [*STAGES[1:], *(f"{stage}-graphs" for stage in STAGES[:3])])
def test_zero_stages_have_close_losses_and_norms(stage: str, stages: dict[str, Command], recipes: dict[str, Path]):
    """Only within a tolerance: weights that differ in the last fp32 bit may round to different bf16 numbers."""
    for run in stages.values():
        run.finish()
    one, other = (read_metrics(recipes["lomar"].parent / "runs" / name / "metrics.jsonl") for name in ("zero0", stage))
    assert len(one) == 10
    assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in one], rel=1e-3)
    assert [row["grad_norm"] for row in other] == pytest.approx([row["grad_norm"] for row in one], rel=1e-2)
    assert one[-1]["loss"] < one[0]["loss"]


def test_compiled_run_is_close_to_eager(killed: dict[str, Path]):
    eager, compiled = (read_metrics(killed[name] / "metrics.jsonl") for name in ("lomar_fast", "compiled"))
    assert [row["loss"] for row in compiled] == pytest.approx([row["loss"] for row in eager], rel=2e-2)


def test_run_with_cuda_graphs_is_close_to_eager(killed: dict[str, Path]):
    eager, graphs = (read_metrics(killed[name] / "metrics.jsonl") for name in ("lomar_fast", "graphs"))
    assert [row["loss"] for row in graphs] == pytest.approx([row["loss"] for row in eager], rel=1e-3)


def test_out_of_memory_prints_a_one_line_error(
    device: torch.device, write_recipe: Callable[..., Path], command: Callable[..., Command], tmp_path: Path
):
    """64 images of 16,384 tokens each would need half a terabyte."""
    if device.type != "cuda":
        pytest.skip("on a CPU the system would kill us")
    recipe = write_recipe(
        tmp_path,
        "too_large",
        method={"name": "simmim", "mask_patch_size": 8},
        model=EAGER | {"arch": "vit_base", "patch_size": 8, "position": "sincos"},
    )
    run = command(recipe, "data.image_size=1024", "train.global_batch_size=64")
    (output,) = run.outputs()
    assert run.returncode == 1
    assert_one_line(output)


def assert_one_line(output: str) -> None:
    """The output has no traceback, and a single line that reports full memory and names the key to change."""
    assert "Traceback" not in output, output
    (line,) = [line for line in output.splitlines() if "memory is full" in line]
    assert line.startswith("error: the GPU's memory is full")
    assert "train.gradient_accumulation_steps higher than 1 (the micro-batch is 64)" in line
