"""Pretrains an encoder: `deepspeed pretrain/run.py RECIPE [section.key=value ...]`, also by torchrun, srun or python.

RECIPE is a YAML file or the name of one in pretrain/recipes. A run that was stopped continues when the same command
is given again.
"""

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `deepspeed pretrain/run.py` starts us as a script

import torch

from data.index import Index, load_index
from pretrain.config import Config, load
from pretrain.faults import Diverged, Stopped, watch_signals
from pretrain.launch import World, find_world, leave, start
from pretrain.runfolder import RunFolder


def parse(arguments: list[str]) -> Config[Any]:
    """The checked configuration of a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    options = parser.parse_args(arguments)
    return load(options.recipe, options.overrides)


def pretrain(config: Config[Any], world: World) -> None:
    """The whole run, on all ranks."""
    index = load_index(config.data.shards)  # before the ranks are bound together: reading many shards takes its time
    device = start(world)
    folder = RunFolder(Path(config.runs) / config.name)
    if world.is_main:
        with folder.owned():
            _train(config, world, device, index, folder)
    else:
        _train(config, world, device, index, folder)


def _train(config: Config[Any], world: World, device: torch.device, index: Index, folder: RunFolder) -> None:
    from pretrain.build import (  # these import DeepSpeed, which looks for its accelerator at once
        build_average,
        build_evaluation,
        build_loader,
        build_method,
        build_probe,
    )
    from pretrain.checkpoint import Checkpoints, TrainState
    from pretrain.engine import build_engine, ds_settings, effective_settings
    from pretrain.finish import finish
    from pretrain.loop import Run, train
    from pretrain.report import conclude, introduce

    settings = ds_settings(config, world.size)
    method = build_method(config)
    loader = build_loader(config, method, index, world)
    average = build_average(config, method, device)
    probe = build_probe(config, method, world, device)
    engine = build_engine(method, config, settings)
    fresh = TrainState(
        fingerprint=index.fingerprint,
        world_size=world.size,
        zero_stage=engine.zero_optimization_stage(),
        trained_function=config.trained_function(),
    )
    checkpoints = Checkpoints(folder.checkpoints, world, config.checkpoint)
    state, resumed = checkpoints.resume(engine, average, fresh)
    run = Run(config, world, device, folder, loader, engine, average, checkpoints, state)
    run.evaluation = build_evaluation(run, probe)
    if world.is_main:
        effective = effective_settings(engine)
        folder.config.write_text(config.to_yaml())
        folder.write_environment(deepspeed=effective, world_size=world.size, samples=len(index))
        introduce(run, effective, len(index), resumed)
    train(run)
    finish(engine, average, config, index, folder, world, device)
    if world.is_main:
        conclude(folder, checkpoints.names()[0])
    torch.distributed.barrier()  # a launcher may end the ranks that outlive the first to leave


def main() -> NoReturn:
    """Exit code 0 when the run is complete or was stopped by a signal, 1 with one clear line otherwise."""
    watch_signals()
    try:
        world = find_world()
        config = parse(sys.argv[1:])
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":  # the same on every rank
            print(f"error: {error}", file=sys.stderr)
        leave(1)
    try:
        pretrain(config, world)
    except Stopped as stopped:
        if world.is_main:
            print(stopped)
    except (ValueError, Diverged, OSError) as error:
        print(f"error on rank {world.rank}: {error}", file=sys.stderr)
        leave(1)
    except Exception:
        traceback.print_exc()
        leave(1)
    leave(0)


if __name__ == "__main__":
    main()
