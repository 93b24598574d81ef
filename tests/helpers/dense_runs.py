"""What the tests of real trainings of detectors and of segmentors share: engines, launches, and what came of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def write_engines(folder: Path) -> dict[str, list[str]]:
    """Files of DeepSpeed's keys, and the change that asks for each; `plain` is the Runner without any."""
    engines: dict[str, list[str]] = {"plain": []}
    for stage in (1, 2, 3):
        zero: dict[str, Any] = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True}
        if stage == 3:  # by default all of so small a model would stay gathered
            for key in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance"):
                zero[f"stage3_{key}"] = 0
        (folder / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": zero}))
        engines[f"zero{stage}"] = [f"engine={folder}/zero{stage}.json"]
    return engines


def launch(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command as a user types it, `deepspeed` and `torchrun` among them."""
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "TORCH_EXTENSIONS_DIR": str(cwd)}
    return subprocess.run(command, cwd=cwd, env=environment, timeout=300, capture_output=True, text=True)


def said(folder: Path, job: str) -> str:
    """What a job of `run_jobs` ended with, the same on both ranks."""
    first, second = ((folder / f"{job}-rank{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    return first


def last(work_dir: Path) -> dict[str, Any]:
    """The newest checkpoint's content; our own file."""
    path = Path((work_dir / "last_checkpoint").read_text())
    content: dict[str, Any] = torch.load(path / "weights.pth" if path.is_dir() else path, weights_only=False)
    return content


def groups(work_dir: Path) -> list[dict[str, Any]]:
    """The optimiser's, in the newest checkpoint; of ZeRO's by DeepSpeed's files."""
    path = Path((work_dir / "last_checkpoint").read_text())
    if path.is_file():
        return last(work_dir)["optimizer"]["param_groups"]
    state = torch.load(path / "zero_pp_rank_0_mp_rank_00_optim_states.pt", weights_only=False)["optimizer_state_dict"]
    return (state.get("base_optimizer_state") or state["optimizer_state_dict"])["param_groups"]


def logged(content: dict[str, Any], name: str) -> list[float]:
    """A number of each iteration."""
    return list(content["message_hub"]["log_scalars"][f"train/{name}"].data[0])


def measured(work_dir: Path) -> list[dict[str, Any]]:
    """All evaluations."""
    return [json.loads(line) for line in (work_dir / "evaluation.jsonl").read_text().splitlines()]
