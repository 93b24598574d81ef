"""This process among those of the run, started by deepspeed, torchrun, srun or plain python."""

import multiprocessing
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import NoReturn

import torch

# Longer than any step or collective, shorter than a wasted night.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """Which process this is, of how many."""

    rank: int
    size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


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
    elif "SLURM_STEP_ID" in env:  # a task of srun; the batch script itself has SLURM_PROCID too, but no step
        env["RANK"], env["LOCAL_RANK"] = env["SLURM_PROCID"], env["SLURM_LOCALID"]
        env["WORLD_SIZE"] = env["SLURM_STEP_NUM_TASKS"]
        env.setdefault("MASTER_ADDR", _first_host(env["SLURM_STEP_NODELIST"]))
        # A port for each job, so that two jobs on a node do not collide.
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
    else:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    return World(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]))


def _first_host(nodelist: str) -> str:
    hosts = subprocess.run(["scontrol", "show", "hostnames", nodelist], check=True, capture_output=True, text=True)
    return hosts.stdout.split()[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def import_deepspeed(world: World) -> ModuleType:
    """DeepSpeed, for the accelerator that this process has; it looks for one as soon as it is imported.

    Raises:
        ValueError: DS_ACCELERATOR=cuda without a usable GPU.
    """
    if os.environ.get("DS_ACCELERATOR") == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"DS_ACCELERATOR=cuda, but torch {torch.__version__} finds no usable GPU: check nvidia-smi and that the "
            f"driver supports CUDA {torch.version.cuda}; to train on the CPU set DS_ACCELERATOR=cpu"
        )
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        # The launchers start several processes on a node and do not set their threads: share the cores.
        threads = max(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", world.size)), 1)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", threads)))
    import deepspeed

    deepspeed.logger.setLevel("WARNING")
    # An inference kernel for CPUs that training never calls. torch guards its build with a lock file that outlives a
    # killed process: from then on every start would wait forever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def init_distributed(world: World) -> torch.device:
    """Joins the process group and picks this rank's device.

    Raises:
        ValueError: as `import_deepspeed`, or another run is listening on the port.
    """
    deepspeed = import_deepspeed(world)
    if torch.cuda.is_available():
        if world.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {world.local_rank} has no GPU: this node shows {torch.cuda.device_count()}; start one "
                f"process for each"
            )
        torch.cuda.set_device(world.local_rank)
    try:
        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ValueError(
            f"port {os.environ['MASTER_PORT']} is already in use, probably by another run on this machine: choose "
            f"another, for example deepspeed (or torchrun) --master_port={_free_port()} ..."
        ) from None
    return torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def exit_process(code: int) -> NoReturn:
    """Ends this process and its data workers at once.

    A normal exit would wait for ranks that may never arrive, and sometimes aborts in gloo's threads at the very end.
    """
    for child in multiprocessing.active_children():
        child.kill()  # a worker that cannot hand over its last batch would outlive us
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
