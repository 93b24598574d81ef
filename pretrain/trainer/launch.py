"""This process's place in the run, whether started by deepspeed, torchrun, srun or plain python."""

import contextlib
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import psutil
import torch

from pretrain.trainer.meeting import free_port, meet
from pretrain.trainer.phases import report_if_slow

TIMEOUT = timedelta(minutes=30)  # of collectives: longer than any step, shorter than a wasted night
_DEEPSPEED_PORT = "29500"  # of every run, unless --master_port says otherwise


@dataclass(frozen=True)
class World:
    """Which process this is, and how many there are."""

    rank: int
    size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def error(self) -> str:
        """How its error messages begin; a rank says which one it is if there are several."""
        return "error" if self.size == 1 else f"error on rank {self.rank}"


def find_world() -> World:
    """Reads the launcher's variables, and completes RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* for DeepSpeed.

    Raises:
        ValueError: some of the launcher's variables are missing.
    """
    env = os.environ
    if "RANK" in env:  # deepspeed, torchrun
        missing = [name for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
        if missing:
            raise ValueError(f"RANK is set but {', '.join(missing)} is not: start with deepspeed, torchrun or srun")
        if env["MASTER_PORT"] == _DEEPSPEED_PORT and env.get("LOCAL_SIZE") == env["WORLD_SIZE"]:
            env["MASTER_PORT"] = _port_of_launcher() or _DEEPSPEED_PORT
    elif "SLURM_STEP_ID" in env:  # a task of srun; the batch script itself has SLURM_PROCID too, but no step
        env["RANK"], env["LOCAL_RANK"] = env["SLURM_PROCID"], env["SLURM_LOCALID"]
        env["WORLD_SIZE"] = env["SLURM_STEP_NUM_TASKS"]
        env.setdefault("MASTER_ADDR", _first_host(env["SLURM_STEP_NODELIST"]))
        # A port for each job, so that two jobs on a node do not collide, below those that the kernel assigns.
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 12000))
    else:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    return World(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]))


# Processes that start ranks, and end them when they end themselves.
_LAUNCHERS = re.compile(r"(^|/)(deepspeed|torchrun|_node\.sh)$|^(deepspeed\.launcher|torch\.distributed)\.|^slurmstepd")


def launchers() -> list[psutil.Process]:
    """The launchers of this process, from its parent upwards; none for plain python."""
    found: list[psutil.Process] = []
    for process in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):  # another user's
            if not any(_LAUNCHERS.search(word) for word in process.cmdline()[:5]):
                break
            found.append(process)
    return found


def has_ended(process: psutil.Process) -> bool:
    """Whether a process has ended, even if nobody has asked for its exit code yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def ranks_on_node(world: World) -> int:
    """The number of ranks on each node; all ranks if the launcher does not say."""
    env = os.environ
    if "SLURM_STEP_NUM_NODES" in env and "LOCAL_WORLD_SIZE" not in env:
        return world.size // int(env["SLURM_STEP_NUM_NODES"])
    return int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or world.size)


def _first_host(nodelist: str) -> str:
    hosts = subprocess.run(["scontrol", "show", "hostnames", nodelist], check=True, capture_output=True, text=True)
    return hosts.stdout.split()[0]


def _port_of_launcher() -> str | None:
    """A port for each `deepspeed` on a node, the same for all of its ranks; None if it did not start this process."""
    parent = psutil.Process(os.getppid())
    if "deepspeed.launcher.launch" not in parent.cmdline():
        return None
    return str(20000 + (parent.pid + int(parent.create_time() * 1000)) % 12000)  # below those that the kernel assigns


def choose_accelerator() -> None:
    """Tells DeepSpeed if there is no GPU, which it would otherwise log at length; called before it is imported."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"


def import_deepspeed() -> ModuleType:
    """Imports DeepSpeed for the accelerator that this process has; DeepSpeed looks for one on import.

    Raises:
        ValueError: DS_ACCELERATOR=cuda without a usable GPU.
    """
    if os.environ.get("DS_ACCELERATOR") == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"DS_ACCELERATOR=cuda, but torch {torch.__version__} finds no usable GPU: check nvidia-smi and that the "
            f"driver supports CUDA {torch.version.cuda}; to train on the CPU set DS_ACCELERATOR=cpu"
        )
    choose_accelerator()
    with report_if_slow("importing DeepSpeed"):
        import deepspeed

    deepspeed.logger.setLevel("WARNING")
    # An inference kernel for CPUs that training never calls. torch guards its build with a lock file that outlives a
    # killed process: after that, every start would wait forever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def init_distributed(world: World, timeout: timedelta = TIMEOUT) -> torch.device:
    """Joins the process group and picks this rank's device.

    Args:
        timeout: of collectives; a training with a watchdog needs none.

    Raises:
        ValueError: as `import_deepspeed` and `meet`.
        Stopped: as `meet`.
    """
    deepspeed = import_deepspeed()
    if torch.cuda.is_available():
        count, gpu = torch.cuda.device_count(), world.local_rank
        if count == 1 and os.environ.get("CUDA_VISIBLE_DEVICES"):  # the scheduler has given each rank its own
            gpu = 0
        if gpu >= count:
            raise ValueError(f"local rank {gpu} has no GPU: this node has {count} visible; start one process per GPU")
        os.environ["LOCAL_RANK"] = str(gpu)  # for DeepSpeed
        torch.cuda.set_device(gpu)
    meet(world.rank, world.size)
    with report_if_slow(f"connecting the {world.size} ranks"):
        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if "OMP_NUM_THREADS" not in os.environ:  # not all launchers set it: share the cores
        torch.set_num_threads(_gather_cores(world))
    return torch.device("cpu")


def _gather_cores(world: World) -> int:
    """The number of cores that are this rank's share; called by all ranks together."""
    mine = (Path("/proc/sys/kernel/random/boot_id").read_text(), os.sched_getaffinity(0))  # the machine, and its cores
    ranks: list[tuple[str, set[int]]] = [mine] * world.size
    torch.distributed.all_gather_object(ranks, mine)
    return share_of_cores(mine[1], [cores for machine, cores in ranks if machine == mine[0]])


def share_of_cores(mine: set[int], on_machine: Sequence[set[int]]) -> int:
    """How many threads a rank starts, at least one: a core that several ranks may run on is divided among them.

    Args:
        mine: cores that the rank may run on.
        on_machine: the same for all ranks on its machine, including itself.
    """
    return max(int(sum(1 / sum(core in cores for cores in on_machine) for core in mine) + 1e-6), 1)


def exit_process(code: int) -> NoReturn:
    """Ends this process and its data workers at once.

    A normal exit would wait for ranks that may never arrive, and sometimes aborts in gloo's threads at the very end.
    """
    for child in multiprocessing.active_children():
        child.kill()  # a worker that cannot hand over its last batch would outlive us
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # its reader has ended
            stream.flush()
    os._exit(code)
