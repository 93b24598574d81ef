"""What runs are waited for and compared by."""

import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pretrain.metrics import read_metrics


def wait_for(path: Path, processes: Any, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        assert all(p.poll() is None for p in processes.all), processes.outputs()
        time.sleep(0.002)


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
    elif not hasattr(first, "__dict__"):
        assert first == second


def assert_same_run(whole: Path, other: Path) -> None:
    """Losses, gradient norms, encoder and the whole optimiser state, bit for bit."""
    keys = ("step", "epoch", "loss", "lr", "grad_norm")
    assert [[row[k] for k in keys] for row in read_metrics(whole / "metrics.jsonl")] == [
        [row[k] for k in keys] for row in read_metrics(other / "metrics.jsonl")
    ]
    encoders = [load_file(folder / "encoder.safetensors") for folder in (whole, other)]
    assert_same_bits(*encoders)
    last = Path("checkpoints") / (whole / "checkpoints" / "latest").read_text()
    names = sorted(p.name for p in (whole / last).glob("*.pt"))
    assert names == sorted(p.name for p in (other / last).glob("*.pt"))
    for name in names:  # our own files
        assert_same_bits(*(torch.load(folder / last / name, weights_only=False) for folder in (whole, other)))
