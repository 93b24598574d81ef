"""Pretrains an encoder: `deepspeed pretrain/run.py RECIPE [section.key=value ...]`, also by torchrun, srun or python.

RECIPE is a YAML file or the name of one in pretrain/recipes. A run that was stopped continues when the same command
is given again.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `deepspeed pretrain/run.py` starts us as a script

import torch

from data.index import Index, load_index
from pretrain.config import PretrainConfig, load
from pretrain.trainer.launch import World, init_distributed
from pretrain.trainer.logs import log_to_file
from pretrain.trainer.main import main
from pretrain.trainer.phases import report_if_slow
from pretrain.trainer.run_folder import RunFolder
from pretrain.trainer.signals import Stopped

_log = logging.getLogger(__name__)


def pretrain(config: PretrainConfig, world: World) -> None:
    """A whole run; called on every rank."""
    with report_if_slow(f"the index of {config.data.shards} is read or made"):
        index = load_index(config.data.shards)  # before the process group exists: indexing many shards takes long
    device = init_distributed(world)
    folder = RunFolder(Path(config.runs) / config.name)
    with folder.locked(world.is_main):
        log_to_file(folder.logs, world)
        _train(config, world, device, index, folder)


def _train(config: PretrainConfig, world: World, device: torch.device, index: Index, folder: RunFolder) -> None:
    # These import DeepSpeed, which chooses its accelerator on import.
    from pretrain.build import build_ema, build_evaluation, build_method
    from pretrain.finish import finish, finish_stopped
    from pretrain.numerics import apply_numerics, check_window_kernel, choose_numerics
    from pretrain.trainer.assemble import Parts, assemble, build_loader
    from pretrain.trainer.engine import ds_settings, zero_stage
    from pretrain.trainer.loop import train
    from pretrain.trainer.optim import build_adamw, parameter_groups
    from pretrain.trainer.report import describe_outputs, log_outputs

    settings = ds_settings(config, world.size)
    numerics = choose_numerics(config, device, zero_stage(settings))
    if numerics.why_sdpa and device.type == "cuda" and config.model.position == "relative" and world.is_main:
        _log.info("the kernel for attention in windows is not used: %s", numerics.why_sdpa)
    if numerics.compile or numerics.attention == "triton":
        folder.cache_compiled()
    if numerics.attention == "triton":
        with report_if_slow("the kernel for attention in windows is compiled and checked"):
            check_window_kernel(config, device)
    method = build_method(config)
    ema = build_ema(config, method, device)
    for module in filter(None, (method, ema.model)):
        apply_numerics(module, numerics)
    parts = Parts(
        method,
        build_adamw(parameter_groups(method, config.optim.weight_decay), config, zero_stage(settings)),
        ema,
        build_loader(config, index, world, mask_sampler=method.mask_sampler()),
        build_evaluation(config, method, world, device),
        numerics.signature(),
    )
    run = assemble(config, world, device, folder, index, settings, parts)
    try:
        train(run)
    except Stopped as stopped:
        _log.info("%s", stopped)  # at once: who has sent the signal may not wait for what follows
        finish_stopped(run, index)
        raise Stopped(describe_outputs(run)) from None
    finish(run, index)
    log_outputs(run)


if __name__ == "__main__":
    main(__doc__, load, pretrain)
