"""How many cores there are to use, and how many processes can decode for a rank: its share of them."""

import os
from pathlib import Path
from typing import Final

AUTO: Final = "auto"
MOST_WORKERS = 32  # per rank: more would decode faster than one process can take batches
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_LOCAL_RANKS = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # torchrun's and slurm/_node.sh's, DeepSpeed's


def count_workers(wish: int | str) -> int:
    """Resolves `data.num_workers`: a number is kept; `auto` is one core per worker, and one for the rank itself."""
    if wish != AUTO:
        return int(wish)
    return min(max(cores_of_a_rank() - 1, 1), MOST_WORKERS)


def available_cores() -> int:
    """The number of CPU cores that this process may use: under a scheduler or in a container, not all of them."""
    return min(len(os.sched_getaffinity(0)), _quota())


def cores_of_a_rank() -> int:
    """Returns this rank's share of the cores that this process may use, or that Slurm gave this task."""
    cores, task = available_cores(), os.environ.get("SLURM_CPUS_PER_TASK")
    if task:
        cores = min(cores, int(task))
    # If the launcher does not say: a Slurm task is one rank; without Slurm all ranks are here.
    others = 1 if task else os.environ.get("WORLD_SIZE") or 1
    ranks = next((os.environ[name] for name in _LOCAL_RANKS if os.environ.get(name)), others)
    return max(cores // int(ranks), 1)


def _quota() -> int:
    """A container's limit, in cores."""
    try:
        limit, period = _QUOTA.read_text().split()
        return os.cpu_count() or 1 if limit == "max" else max(int(limit) // int(period), 1)
    except (OSError, ValueError):  # no such limit, or another version of control groups
        return os.cpu_count() or 1
