"""How many processes can decode for a rank: its share of the cores that the node lets it use."""

import os
from pathlib import Path
from typing import Final

AUTO: Final = "auto"
MOST_WORKERS = 32  # of a rank: more decode faster than one process takes batches
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_LOCAL_RANKS = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # torchrun's and slurm/_node.sh's, DeepSpeed's


def count_workers(wish: int | str) -> int:
    """`data.num_workers`: a number as it is; `auto` is a core for each, and one for the rank itself."""
    if wish != AUTO:
        return int(wish)
    return min(max(cores_of_a_rank() - 1, 1), MOST_WORKERS)


def cores_of_a_rank() -> int:
    """This rank's share of those that this process may use, or that Slurm gave this task."""
    cores, task = min(len(os.sched_getaffinity(0)), _quota()), os.environ.get("SLURM_CPUS_PER_TASK")
    if task:
        cores = min(cores, int(task))
    # Without a word of the launcher: a task is a rank, or all ranks are here.
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
