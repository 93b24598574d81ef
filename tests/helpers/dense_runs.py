"""Engines, launches and results for the tests of real trainings of detectors and segmentors."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from helpers.waiting import SECONDS

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def write_engines(folder: Path) -> dict[str, list[str]]:
    """Write DeepSpeed config files; returns the override that selects each. `plain` is mmengine's Runner.

    They equal the shipped ones, except that buckets are so small that a small model fills several.
    """
    engines: dict[str, list[str]] = {"plain": []}
    for stage in (1, 2, 3):
        zero: dict[str, Any] = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())["zero_optimization"]
        zero["reduce_bucket_size"] = 30_000
        if stage == 3:  # by default, all parameters of such a small model would stay gathered
            for key in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance"):
                zero[f"stage3_{key}"] = 0
        (folder / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": zero}))
        engines[f"zero{stage}"] = [f"train.ds_config={folder}/zero{stage}.json"]
    return engines


def launch(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a user types it, including `deepspeed` and `torchrun`."""
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "TORCH_EXTENSIONS_DIR": str(cwd)}
    return subprocess.run(command, cwd=cwd, env=environment, timeout=SECONDS, capture_output=True, text=True)


def ended_with(folder: Path, job: str) -> str:
    """Return the message that a job of `run_jobs` ended with, which must be the same on both ranks."""
    first, second = ((folder / f"{job}-rank{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    return first


def last_checkpoint(work_dir: Path) -> dict[str, Any]:
    """Load the newest checkpoint."""
    path = Path((work_dir / "last_checkpoint").read_text())
    content: dict[str, Any] = torch.load(path / "weights.pth" if path.is_dir() else path, weights_only=False)
    return content


def parameter_groups(work_dir: Path) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups in the newest checkpoint; with ZeRO, from DeepSpeed's files."""
    path = Path((work_dir / "last_checkpoint").read_text())
    if path.is_file():
        return last_checkpoint(work_dir)["optimizer"]["param_groups"]
    state = torch.load(path / "zero_pp_rank_0_mp_rank_00_optim_states.pt", weights_only=False)["optimizer_state_dict"]
    return (state.get("base_optimizer_state") or state["optimizer_state_dict"])["param_groups"]


def logged(content: dict[str, Any], name: str) -> list[float]:
    """Return a logged scalar of each iteration."""
    return list(content["message_hub"]["log_scalars"][f"train/{name}"].data[0])


def evaluations(work_dir: Path) -> list[dict[str, Any]]:
    """Return the results of all evaluations."""
    return [json.loads(line) for line in (work_dir / "evaluation.jsonl").read_text().splitlines()]
