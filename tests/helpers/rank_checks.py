"""Functions that wait for runs and compare them."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.steps import POISONED
from helpers.waiting import SECONDS
from pretrain.trainer.metrics import read_metrics


def wait_for(path: Path, processes: Any) -> None:
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        assert all(p.returncode is None for p in processes.all), processes.outputs()
        time.sleep(0.002)


def newest(run: Path) -> str:
    """Return the last complete checkpoint of a run."""
    return max(manifest.parent.name for manifest in run.glob("checkpoints/step_*/manifest.json"))


def assert_same_bits(first: Any, second: Any) -> None:
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same_bits(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same_bits(a, b)
    elif first != second:  # DeepSpeed's own objects, which define no equality
        assert first is not second
        assert_same_bits(vars(first), vars(second))


def moments(tree: Any) -> Iterator[torch.Tensor]:
    """Yield Adam's first moments or LARS's momentum from anywhere in a checkpoint file."""
    if isinstance(tree, dict):
        yield from (value for key, value in tree.items() if key in ("exp_avg", "momentum_buffer"))
    if isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from moments(value)


def assert_same_run(whole: Path, other: Path) -> None:
    """Check that losses, gradient norms, final files and the last checkpoint are bitwise identical."""
    keys = ("step", "epoch", "loss", "lr", "grad_norm", "skipped_steps")
    assert [[row[k] for k in keys] for row in read_metrics(whole / "metrics.jsonl")] == [
        [row[k] for k in keys] for row in read_metrics(other / "metrics.jsonl")
    ]
    written = sorted(p.name for p in whole.glob("*.safetensors"))
    assert written
    for name in written:
        assert_same_bits(*(load_file(folder / name) for folder in (whole, other)))
    last = Path("checkpoints") / (whole / "checkpoints" / "latest").read_text()
    names = sorted(p.name for p in (whole / last).glob("*.pt"))
    assert sorted(p.name for p in (whole / last).iterdir()) == sorted(p.name for p in (other / last).iterdir())
    for name in (p.name for p in (whole / last).glob("*.safetensors")):
        assert_same_bits(*(load_file(folder / last / name) for folder in (whole, other)))
    first_moments = []
    for name in names:  # our own files
        first, second = (torch.load(folder / last / name, weights_only=False) for folder in (whole, other))
        assert_same_bits(first, second)
        first_moments += list(moments(first))
    assert any(moment.any() for moment in first_moments), "the optimiser's state was compared"


def assert_same_steps(run: Path, plain: list[tuple[float, float]]) -> None:
    """Check that the losses and gradient norms logged by a run of steps.py match plain torch."""
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [int(step >= POISONED) for step in range(len(plain))]
    for step, (row, (loss, norm)) in enumerate(zip(rows, plain, strict=True)):
        if step == POISONED:  # non-finite values are logged as null
            assert (row["loss"], row["grad_norm"]) == (None, None)
        else:
            assert row["loss"] == pytest.approx(loss, rel=1e-5), step
            assert row["grad_norm"] == pytest.approx(norm, rel=1e-4), step
