"""Waiting less keeps results bitwise identical: late reading of skipped steps, bucket sizes and overlap."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import host_reads
from helpers.rank_checks import assert_same_bits, moments, newest
from helpers.steps import MIDDLE, POISONED, STEPS, run_jobs

from pretrain.trainer.checkpoint_layout import checkpoint_name, read_state
from pretrain.trainer.metrics import read_metrics

pytestmark = pytest.mark.engine

STEP = ("loss", "lr", "grad_norm", "skipped_steps")
NO_LOG = "log.every_steps=1000"  # whether a step was skipped is read in the middle of the next one


@pytest.fixture(scope="module")
def read_late(
    write_recipe: Callable[..., Path], start_once: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Each job twice: logging every step, which has to wait for it, and not logging."""
    folder = tmp_path_factory.mktemp("read_late")
    plain = str(write_recipe(tmp_path_factory.mktemp("recipes")))
    teacher = str(write_recipe(tmp_path_factory.mktemp("recipes"), lut={"hidden_dim": 16, "momentum": 0.9}))
    jobs = {
        "zero0": [plain, "train.ds_config=zero0", "train.gradient_accumulation_steps=2", "optim.clip_grad=0.1"],
        "zero1": [plain, "train.ds_config=zero1", "train.gradient_accumulation_steps=2"],
        "teacher": [teacher, "train.ds_config=zero0"],
    }
    run_jobs(start_once, folder, jobs | {f"{name}-late": [*job, NO_LOG] for name, job in jobs.items()})
    return folder


@pytest.mark.parametrize("whole", ["whole", "resumed"])
@pytest.mark.parametrize("job", ["zero0", "zero1", "teacher"])
def test_learning_late_of_a_skipped_step_changes_nothing(job: str, whole: str, read_late: Path):
    """The second step is skipped, and the checkpoint right after it must already record that."""
    at_once, late = read_late / job / whole, read_late / f"{job}-late" / whole
    assert_same_bits(*(torch.load(run / "state.pt") for run in (at_once, late)))
    assert [row["step"] for row in read_metrics(late / "metrics.jsonl")] == [STEPS]
    last = [read_metrics(run / "metrics.jsonl")[-1] for run in (at_once, late)]
    assert [row["skipped_steps"] for row in last] == [1, 1]
    assert [row["lr"] for row in last] == [last[0]["lr"]] * 2
    assert [row["grad_norm"] for row in last] == [last[0]["grad_norm"]] * 2
    for step, updates in ((MIDDLE, MIDDLE - 1), (STEPS, STEPS - 1)):
        states = [read_state(run / "checkpoints" / checkpoint_name(step)) for run in (at_once, late)]
        assert [(state.step, state.updates, state.consecutive_nonfinite) for state in states] == [
            (step, updates, int(step == POISONED + 1))
        ] * 2
    if whole == "whole":
        listed = [(run / "nonfinite.jsonl").read_text() for run in (at_once, late)]
        assert listed[0] == listed[1]
        assert json.loads(listed[0])["step"] == POISONED + 1


def test_diverging_training_ends_even_without_logging(recipe: Path, start: Callable[..., Any], tmp_path: Path):
    """Every step from the third on is skipped. The third skip is read in the sixth step, which then does nothing."""
    run = start(
        recipe,
        "train.ds_config=zero0",
        "optim.base_lr=1e30",
        "train.max_nonfinite_steps=3",
        "log.every_steps=1000",
        "checkpoint.every_steps=1000",
    )
    output = "".join(run.outputs())
    assert all(process.returncode == 1 for process in run.all), output
    assert "3 steps in a row had a non-finite gradient (train.max_nonfinite_steps)" in output
    rows = [json.loads(line) for line in (tmp_path / "runs" / "tiny" / "nonfinite.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == list(range(steps[0], steps[0] + 3))
    assert all(len(set(row["samples"])) == 8 for row in rows)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_stage_0_step_only_waits_for_the_outcome_of_the_previous_step(
    accumulation: int, recipe: Path, start: Callable[..., Any], tmp_path: Path
):
    keys = ["train.ds_config=auto", NO_LOG, f"train.gradient_accumulation_steps={accumulation}", "optim.clip_grad=0.1"]
    start(tmp_path, recipe, *keys, "checkpoint.every_steps=1000", script=host_reads.__file__, processes=1).finish()
    assert json.loads((tmp_path / "counts.json").read_text()) == [
        {"reads": int(step > 0), "synchronized": 0} for step in range(STEPS)
    ]


# In elements. The model's largest matrix has 24,576. The first size is smaller than several matrices, the second makes
# several buckets, and the third, DeepSpeed's default, holds everything.
BUCKETS = (5_000, 30_000, 500_000_000)


@pytest.fixture(scope="module", params=[1, 2])
def bucketed(
    request: pytest.FixtureRequest,
    write_recipe: Callable[..., Path],
    start_once: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Path]:
    """Training on two ranks with each bucket size, with and without overlap."""
    folder, jobs = tmp_path_factory.mktemp("bucketed"), {}
    recipe = str(write_recipe(tmp_path_factory.mktemp("recipes")))
    for size, overlap in itertools.product(BUCKETS, (False, True)):
        name = f"{size}-{overlap}"
        zero = {"stage": request.param, "overlap_comm": overlap, "contiguous_gradients": True}
        zero |= {"reduce_bucket_size": size, "allgather_bucket_size": size}
        (folder / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))
        jobs[name] = [recipe, f"train.ds_config={folder / name}.json", "train.gradient_accumulation_steps=2"]
    run_jobs(start_once, folder, jobs)
    return [folder / name / "whole" for name in jobs]


@pytest.mark.slow
def test_bucket_size_and_overlap_keep_results_bitwise_identical(bucketed: list[Path]):
    """A sum over two ranks is the same in any order. With more ranks, all-reduce may add in another order."""
    first, *others = bucketed
    effective = [json.loads((run / "effective.json").read_text()) for run in bucketed]
    assert [(run["reduce_bucket_size"], run["overlap_comm"]) for run in effective] == list(
        itertools.product(BUCKETS, (False, True))
    )

    def gradients(run: Path) -> tuple[Any, ...]:
        rows = [[row[key] for key in STEP] for row in read_metrics(run / "metrics.jsonl")]
        files = sorted((run / "checkpoints" / newest(run)).glob("*optim_states.pt"))
        saved = [list(moments(torch.load(file, weights_only=False))) for file in files]
        assert len(saved) == 2
        assert all(moment.any() for part in saved for moment in part)
        return rows, torch.load(run / "state.pt"), saved

    expected = gradients(first)
    for run in others:
        assert_same_bits(gradients(run), expected)
