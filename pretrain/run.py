"""Pretrains an encoder: `deepspeed pretrain/run.py RECIPE [section.key=value ...]`, also by torchrun, srun or python.

RECIPE is a YAML file or the name of one in pretrain/recipes. A run that was stopped continues when the same command
is given again.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `deepspeed pretrain/run.py` starts us as a script

import torch

from data.index import Index, load_index
from pretrain.command import main
from pretrain.config import Config, load
from pretrain.launch import World, start
from pretrain.runfolder import RunFolder


def pretrain(config: Config[Any], world: World) -> None:
    """The whole run, on all ranks."""
    index = load_index(config.data.shards)  # before the ranks are bound together: reading many shards takes its time
    device = start(world)
    folder = RunFolder(Path(config.runs) / config.name)
    with folder.owned(world.is_main):
        _train(config, world, device, index, folder)


def _train(config: Config[Any], world: World, device: torch.device, index: Index, folder: RunFolder) -> None:
    # These import DeepSpeed, which looks for its accelerator at once.
    from pretrain.assemble import Parts, assemble
    from pretrain.build import build_average, build_evaluation, build_loader, build_method, build_probe
    from pretrain.engine import ds_settings, zero_stage
    from pretrain.finish import finish
    from pretrain.loop import train
    from pretrain.optim import build_adamw, parameter_groups
    from pretrain.report import conclude

    settings = ds_settings(config, world.size)
    method = build_method(config)
    groups = parameter_groups(method, config.optim.weight_decay)
    parts = Parts(
        method,
        build_adamw(groups, config, zero_stage(settings)),
        build_average(config, method, device),
        build_loader(config, index, world, view=method.view()),
    )
    probe = build_probe(config, method, world, device)
    run = assemble(config, world, device, folder, index, settings, parts)
    run.evaluation = build_evaluation(run, probe)
    train(run)
    finish(run.engine, run.average, config, index, folder, world, device)
    conclude(run)


if __name__ == "__main__":
    main(__doc__, load, pretrain)
