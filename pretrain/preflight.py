"""Checks the nodes of a run without training: `torchrun ... -m pretrain.preflight RECIPE [section.key=value ...]`.

Start it like `pretrain/run.py` on all nodes, with deepspeed (and --module), torchrun, srun or python. In seconds it
finds nodes whose code, environment, recipe or index differs from the others', and nodes that have too few GPUs or no
space on the disk of the run's folder, cannot read the shards, or are slow at a matrix product or an all-reduce; and
whether the disk has room for a checkpoint.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a launcher may start us as a script
if os.environ.get("LOMAR_VERBOSE", "0") in ("", "0"):  # torch reads it on import
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or ranks that lose another one print C++ stack frames

import torch

from pretrain.config import PretrainConfig, load
from pretrain.start import load_data
from pretrain.trainer.engine import check_engine
from pretrain.trainer.launch import World, init_distributed
from pretrain.trainer.main import main
from pretrain.trainer.node_speed import Speed, check_speed
from pretrain.trainer.preflight import checked_start, room_problem
from pretrain.trainer.run_folder import RunFolder


def preflight(config: PretrainConfig, world: World) -> None:
    """Runs all checks; called on every rank.

    Raises:
        ValueError: as `checked_start` and `check_speed`, or there is no room for a checkpoint.
    """
    # These import DeepSpeed, which chooses its accelerator on import.
    from pretrain.plan.trace import trace_method
    from pretrain.trainer.checkpoint import first_problem

    folder = RunFolder(Path(config.runs) / config.name)
    index = checked_start(
        world, folder.root, config.to_yaml(), lambda: load_data(config, folder), lambda index: index.fingerprint
    )
    device = init_distributed(world)
    # On CPUs, other load would decide the result.
    speeds = check_speed(world, device, config.watchdog.slow_factor if device.type == "cuda" else 0)
    # Exchanged between all ranks: the main rank, which may have the store, does not leave before the others are done.
    if problem := first_problem(room_problem(folder.root, trace_method(config).parameters) if world.is_main else None):
        raise ValueError(problem)
    if world.is_main:
        print(f"{len(index)} samples; code, versions, recipe, shards, disk and GPUs are fine on all ranks")
        print(describe_speeds(speeds, torch.cuda.is_available()))


def describe_speeds(speeds: list[Speed], on_gpus: bool) -> str:
    """One line per node, with the times of its slowest rank."""
    lines = [f"{'node':20} {'ranks':>6} {'product':>10} {'all-reduce of two':>18}   on {'GPUs' if on_gpus else 'CPUs'}"]
    for node in dict.fromkeys(speed.node for speed in speeds):
        ranks = [speed for speed in speeds if speed.node == node]
        product, exchange = max(speed.product for speed in ranks), max(speed.exchange for speed in ranks)
        lines.append(f"{node:20} {len(ranks):6} {1000 * product:7.2f} ms {1000 * exchange:15.2f} ms")
    return "\n".join(lines)


if __name__ == "__main__":
    main(__doc__, load, preflight, check=check_engine)
