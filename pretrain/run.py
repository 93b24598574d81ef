"""Pretrains an encoder: `deepspeed pretrain/run.py RECIPE [section.key=value ...]`, also by torchrun, srun or python.

RECIPE is a YAML file or the name of one in pretrain/recipes. A run that was stopped continues when the same command
is given again.
"""

import logging
import os
import sys
from inspect import getfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `deepspeed pretrain/run.py` starts us as a script
if os.environ.get("LOMAR_VERBOSE", "0") in ("", "0"):  # torch reads it on import
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or ranks that lose another one print C++ stack frames

import torch

from data.index import Index
from downstream.checkpoints.feature_teachers import read_feature_teacher
from downstream.checkpoints.method_weights import LoadedMethod, load_method, load_teacher
from pretrain.config import ELSEWHERE, RECIPES, PretrainConfig, load
from pretrain.methods import METHODS
from pretrain.methods.base import Method
from pretrain.methods.lut import LUT, TeacherModel
from pretrain.methods.targets.features import EncoderTeacher, FeatureTeacher
from pretrain.start import find_start, load_data
from pretrain.trainer.engine import check_engine, check_engine_file
from pretrain.trainer.launch import World, init_distributed, ranks_on_node
from pretrain.trainer.listing import Catalog
from pretrain.trainer.logs import log_to_file
from pretrain.trainer.main import main
from pretrain.trainer.moments import Moments, read_moments
from pretrain.trainer.node_speed import check_speed
from pretrain.trainer.phases import UNLIMITED, report_if_slow
from pretrain.trainer.preflight import checked_start
from pretrain.trainer.run_folder import RunFolder, file_digest
from pretrain.trainer.signals import Stopped

_log = logging.getLogger(__name__)


def pretrain(config: PretrainConfig, world: World) -> None:
    """Does a whole run; called on every rank."""
    folder = RunFolder(Path(config.runs) / config.name)

    # Before the process group exists: indexing many shards takes long.
    index = checked_start(
        world, folder.root, config.to_yaml(), lambda: load_data(config, folder), lambda index: index.fingerprint
    )
    device = init_distributed(world, UNLIMITED)
    if ranks_on_node(world) < world.size and device.type == "cuda":
        check_speed(world, device, config.watchdog.slow_factor)
    with folder.locked(world.is_main):
        log_to_file(folder.logs, world)
        _train(config, world, device, index, folder)


def _train(config: PretrainConfig, world: World, device: torch.device, index: Index, folder: RunFolder) -> None:
    # These import DeepSpeed, which chooses its accelerator on import.
    from pretrain.build import build_ema, build_evaluation, build_method, feature_teacher
    from pretrain.by_size import build_sizes
    from pretrain.finish import finish, finish_stopped
    from pretrain.numerics import apply_numerics, check_window_kernel, choose_numerics
    from pretrain.trainer.assemble import Parts, assemble, build_loader
    from pretrain.trainer.cuda_graphs import graph_steps
    from pretrain.trainer.engine import ds_settings, zero_stage
    from pretrain.trainer.loop import train
    from pretrain.trainer.optim import build_adamw, parameter_groups
    from pretrain.trainer.report import describe_outputs, log_outputs

    settings = ds_settings(config, world.size)
    numerics = choose_numerics(config, device, zero_stage(settings))
    if numerics.why_sdpa and device.type == "cuda" and config.model.position == "relative" and world.is_main:
        _log.info("the window attention kernel is not used: %s", numerics.why_sdpa)
    if numerics.compile or numerics.attention == "triton":
        folder.cache_compiled()
    if numerics.attention == "triton":
        with report_if_slow("compiling and checking the window attention kernel"):
            for _, one in [*config.earlier, (0, config)]:
                check_window_kernel(one, device)
    with report_if_slow("building the model and loading the weights that it starts from"):
        method = build_method(config, _read_teacher(config))
        start = find_start(config, folder, world)
        loaded = _load_start(config, method, start) if start else None
        ema = build_ema(config, method, device)
        if start and isinstance(ema.model, TeacherModel | EncoderTeacher):
            assert config.start
            _log.info("%s", load_teacher(ema.model, start, config.start.load))
        moments = _load_moments(config, loaded)
    for module in filter(None, dict.fromkeys((method, ema.model, feature_teacher(method)))):
        apply_numerics(module, numerics)
    if numerics.cuda_graphs:
        graph_steps(method, zero_stage(settings))
    earlier = build_sizes(config, method, ema, numerics, _read_teacher)
    groups = parameter_groups(method, config.optim.weight_decay, config.optim.decay_class_token)
    parts = Parts(
        method,
        build_adamw(groups, config, zero_stage(settings)),
        ema,
        build_loader(config, index, world, mask_sampler=method.mask_sampler(), earlier=earlier),
        evaluation=build_evaluation(config, method, world, device),
        numerics=numerics.signature(),
        start=loaded.record() if loaded else {},
        moments=moments,
        code={"method.module": file_digest(getfile(METHODS[config.method.name]))} if config.method.module else {},
    )
    run = assemble(config, world, device, folder, index, settings, parts)
    try:
        train(run)
    except Stopped as stopped:
        _log.info("%s", stopped)  # at once: the sender of the signal may not wait for what follows
        finish_stopped(run, index, stopped)
        raise Stopped(describe_outputs(run)) from None
    finish(run, index)
    log_outputs(run)


def _read_teacher(config: PretrainConfig) -> FeatureTeacher | None:
    return read_feature_teacher(config.target, config.grid, config.model.patch_size)


def _load_start(config: PretrainConfig, method: Method | LUT, start: Path) -> LoadedMethod:
    """Loads the start's weights into a method that is not partitioned yet; raises ValueError if that fails."""
    assert config.start
    try:
        loaded = load_method(method, start, config.start.weights, config.start.load)
    except ValueError as error:
        raise ValueError(f"start.{'run' if config.start.run else 'checkpoint'}: {error}") from None
    _log.info("starts from %s", loaded.report)
    return loaded


def _load_moments(config: PretrainConfig, loaded: LoadedMethod | None) -> Moments | None:
    """The optimizer's moments of the parameters that were loaded unchanged, if `start.optimizer` asks for them."""
    if loaded is None or config.start is None or not config.start.optimizer:
        return None
    moments = read_moments(loaded.path).renamed(loaded.taken)
    _log.info("the optimizer starts with the moments of %d parameters", len(moments.names))
    return moments


if __name__ == "__main__":
    catalog = Catalog(PretrainConfig, RECIPES, load, ELSEWHERE, check_engine_file)
    main(__doc__, load, pretrain, check=check_engine, catalog=catalog)
