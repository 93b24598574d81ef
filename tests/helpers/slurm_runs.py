"""Training jobs on Slurm, and comparisons of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from helpers.slurm_cluster import Cluster, Job

STEPS = 5 * 7
ODD = "data.image_size=[64, 80]"  # must reach the trainer as one argument despite space and brackets


def submit(
    cluster: Cluster,
    recipe: Path,
    *overrides: str,
    ranks: int = 1,
    nodes: str = "2",
    options: Sequence[str] = (),
    script: str = "slurm/pretrain_vitb.sh",
    **variables: object,
) -> Job:
    """Submit a job on nodes without GPUs, by default two of them; `ranks` is the number of tasks per node."""
    shape = [f"--nodes={nodes}", f"--ntasks-per-node={ranks}", "--gpus-per-node=0", "--cpus-per-task=1", *options]
    exported = ",".join(f"{name}={value}" for name, value in {"RECIPE": recipe, **variables}.items())
    return cluster.submit(*shape, f"--export=ALL,{exported}", script, ODD, *overrides)


def rows(folder: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl, without a line that is still being written."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_step(job: Job, folder: Path, step: int) -> None:
    def reached() -> bool:
        return any(row["step"] >= step for row in rows(folder))

    job.wait_for(f"step {step} in {folder}", reached)


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(folder)]


def check_same_end(job: Job, folder: Path, whole: Path, restarts: int) -> None:
    end = job.wait_end()
    assert (end["JobState"], int(end["Restarts"])) == ("COMPLETED", restarts), job.logs()
    assert losses(folder) == losses(whole)
    weights, expected = (load_file(run / "encoder.safetensors") for run in (folder, whole))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def rank_process(rank: int, argument: str) -> int:
    """Return the process of a rank, not its loader workers, which are children with the same command line."""
    parents = {}
    for process in psutil.process_iter(["cmdline", "environ", "ppid"]):
        command, environment = process.info["cmdline"] or [""], process.info["environ"] or {}
        is_rank = "pretrain/run.py" in command and argument in command and not command[0].endswith("srun")
        if is_rank and environment.get("SLURM_PROCID") == str(rank):
            parents[process.pid] = process.info["ppid"]
    (found,) = parents.keys() - {child for child, parent in parents.items() if parent in parents}
    return found
