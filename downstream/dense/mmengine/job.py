"""A job on all ranks: mmengine's plain Runner, or its FlexibleRunner on ZeRO, continued and stopped like all runs."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import FlexibleRunner, Runner
from mmengine.utils import import_modules_from_strings

from downstream.dense.mmengine.checkpoint_files import find_weights, last_checkpoint, refuse_pickles
from downstream.dense.mmengine.config_file import Job
from downstream.dense.mmengine.data_order import by_epoch, wrap_train_data
from downstream.dense.mmengine.dataset_keys import datasets
from downstream.dense.mmengine.hooks import DurableCheckpointHook, Fp32OutputsHook, ResumeHook, plain_numbers
from downstream.dense.mmengine.strategy import ZeroStrategy
from pretrain.trainer.checkpoint import first_problem
from pretrain.trainer.engine import OWNED, complete_settings, read_ds_config, zero_stage
from pretrain.trainer.launch import World

_PRECISION = "precision"
_OWNED = OWNED | {
    "train_batch_size": "train_dataloader.batch_size",
    "train_micro_batch_size_per_gpu": "train_dataloader.batch_size",
    "gradient_accumulation_steps": "optim_wrapper.accumulative_counts",
    "gradient_clipping": "optim_wrapper.clip_grad",
    "optimizer": "optim_wrapper.optimizer",
    "scheduler": "param_scheduler",
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "torch_autocast": _PRECISION,
    "data_types": _PRECISION,
    "activation_checkpointing": "model.backbone.checkpoint_blocks",
}


def run(job: Job, world: World, check: Callable[[Config, list[str]], list[str]]) -> None:
    """Trains, or evaluates a checkpoint; the process group is there.

    Args:
        check: looks at the configuration and at the data of some splits, on the main rank; a line about each. It
            raises ValueError where something is wrong.

    Raises:
        ValueError: as `check`, or settings or a checkpoint that do not fit.
        Stopped: a signal came, and everything is saved.
        OSError: a checkpoint could not be written.
    """
    refuse_pickles()
    cfg = copy.deepcopy(job.cfg)
    if imports := cfg.get("custom_imports"):
        import_modules_from_strings(**imports)
    splits = ["test"] if job.test else ["train", "val"] if cfg.get("val_dataloader") else ["train"]
    _on_main(world, lambda: print(*check(cfg, splits), sep="\n", flush=True))
    if job.test:
        _test(cfg, job.test, job.tta, world)
    else:
        _train(cfg, job, world)


def _on_main(world: World, function: Callable[[], None]) -> None:
    """Calls it on the main rank; its error is that of all ranks."""
    problem = None
    if world.is_main:
        try:
            function()
        except (ValueError, OSError) as error:
            problem = str(error)
    if problem := first_problem(problem):
        raise ValueError(problem)


def _test(cfg: Config, checkpoint: str, tta: bool, world: World) -> None:
    """COCO's numbers, or whatever `test_evaluator` measures, as a JSON object in the last line."""
    cfg.load_from, cfg.resume = find_weights(checkpoint), False
    _forget_start(cfg)
    if tta:
        _augment_test(cfg)
    _add_hook(cfg, {}, strict=True, continues=False)
    metrics = _plain_runner(cfg, world).test()
    if world.is_main:
        print(json.dumps(plain_numbers(metrics)), flush=True)


def _augment_test(cfg: Config) -> None:
    if not (cfg.get("tta_model") and cfg.get("tta_pipeline")):
        raise ValueError("tta=true: the configuration has no tta_model and tta_pipeline")
    for _, dataset in datasets(cfg, "test"):
        dataset.pipeline = cfg.tta_pipeline
    # Said here, or mmengine would give the model another one, which stands at the top of mmseg's configurations.
    preprocessor = cfg.model.get("data_preprocessor")
    cfg.model = {**cfg.tta_model, "module": cfg.model, "data_preprocessor": preprocessor}


def _train(cfg: Config, job: Job, world: World) -> None:
    last = last_checkpoint(cfg.work_dir) if job.resume else None
    if last is not None and last.is_dir() != bool(job.engine):
        raise ValueError(
            f"{cfg.work_dir} was trained {'with' if last.is_dir() else 'without'} engine=: continue it so, or start "
            f"anew with another work_dir= and load_from={cfg.work_dir}"
        )
    settings = _settings(cfg, job.engine, world) if job.engine else None
    if settings is None and cfg.optim_wrapper.type == "AmpOptimWrapper" and not torch.cuda.is_available():
        raise ValueError("mmengine's bf16 needs a GPU: give precision=fp32, or engine=zero1, which has it on CPUs, too")
    accumulation = _check_steps(cfg)
    say = _scale_lr(cfg, world)
    as_asked = copy.deepcopy(cfg)
    # mmengine would draw a seed, and after a stop another; ranks are told apart in PlaceHook.
    cfg.randomness.update(seed=cfg.randomness.seed or 0, diff_rank_seed=False)
    wrap_train_data(cfg)
    hook = cfg.default_hooks.checkpoint
    hook.update(type=DurableCheckpointHook.__name__, accumulation=accumulation, suffix="" if settings else ".pth")
    hook.by_epoch = by_epoch(cfg)
    _add_hook(cfg, _trained_as(cfg, settings, world), strict=last is not None, continues=last is not None)
    if cfg.optim_wrapper.type == "AmpOptimWrapper":
        cfg.custom_hooks.append({"type": Fp32OutputsHook.__name__})
    if last is not None:
        _forget_start(cfg)
    start = find_weights(cfg.load_from) if cfg.load_from and last is None else None
    cfg.resume, cfg.load_from = last is not None, str(last) if last else start
    runner = _zero_runner(cfg, settings, start) if settings else _plain_runner(cfg, world)
    if world.is_main:
        begin = f"continues from {last}" if last else f"starts from the weights in {start}" if start else "starts"
        print(f"{say}; {begin}", flush=True)
        as_asked.dump(Path(cfg.work_dir) / "config.py")  # mmengine has dumped what we made of it
    runner.train()


def _trained_as(cfg: Config, settings: dict[str, Any] | None, world: World) -> dict[str, Any]:
    """What a training that continues must have in common with its checkpoint."""
    return {
        "engine": f"ZeRO {zero_stage(settings)}" if settings else "none",
        "the number of ranks": world.size,
        "train_dataloader.batch_size": cfg.train_dataloader.batch_size,
        "optim_wrapper.accumulative_counts": cfg.optim_wrapper.accumulative_counts,
        "optim_wrapper.type": cfg.optim_wrapper.type,
        # These two are in the checkpoint as well, and what is there would silently win.
        "optim_wrapper.optimizer": str(cfg.optim_wrapper.optimizer),
        "param_scheduler": str(cfg.get("param_scheduler")),
        "randomness.seed": cfg.randomness.seed,
    }


def _plain_runner(cfg: Config, world: World) -> Runner:
    """With the group that there is already: mmengine would make one itself, and cannot on CPUs."""
    cfg.launcher = "pytorch" if world.size > 1 else "none"
    if not torch.cuda.is_available():
        cfg.model_wrapper_cfg = {
            "type": "MMDistributedDataParallel",
            "broadcast_buffers": False,
            "find_unused_parameters": cfg.find_unused_parameters,
            "device_ids": None,  # mmengine's default is a GPU
        }
    return Runner.from_cfg(cfg)


def _zero_runner(cfg: Config, settings: dict[str, Any], start: str | None) -> FlexibleRunner:
    cfg.launcher = "pytorch"
    cfg.setdefault("env_cfg", {})
    cfg.strategy = {"type": ZeroStrategy.__name__, "settings": settings, "start": start}
    if not cfg.resume:
        cfg.load_from = None
    return FlexibleRunner.from_cfg(cfg)


def _settings(cfg: Config, engine: str, world: World) -> dict[str, Any]:
    """All of DeepSpeed's keys.

    Raises:
        ValueError: as `read_ds_config`, or what ZeRO does not do.
    """
    clip = dict(cfg.optim_wrapper.clip_grad or {})
    if clip and (clip.get("type", "norm") != "norm" or float(clip.get("norm_type", 2)) != 2):
        raise ValueError(f"optim_wrapper.clip_grad={clip}: with engine= gradients are clipped by their norm of type 2")
    if cfg.get("compile"):
        raise ValueError("compile is for the plain Runner: delete it, or leave out engine=")
    if any(hook["type"] == "EMAHook" for hook in cfg.get("custom_hooks") or []):
        # It copies parameters, which ZeRO 3 cuts up, and mmengine's FlexibleRunner loads before the hook can.
        raise ValueError("EMAHook is for the plain Runner: delete it from custom_hooks, or leave out engine=")
    keys = read_ds_config(engine, _OWNED)
    if not zero_stage(keys):
        raise ValueError(f"{engine} is of ZeRO stage 0, which is what the plain Runner does: leave out engine=")
    return complete_settings(
        keys,
        micro_batch=cfg.train_dataloader.batch_size,
        accumulation=cfg.optim_wrapper.accumulative_counts,
        world_size=world.size,
        clip_grad=float(clip.get("max_norm", 0.0)),
        bf16=cfg.optim_wrapper.type == "AmpOptimWrapper",
    )


def _check_steps(cfg: Config) -> int:
    """The micro-batches of an optimiser step, which must divide what is counted in iterations."""
    accumulation = int(cfg.optim_wrapper.accumulative_counts)
    if not by_epoch(cfg):
        counted = {
            "train_cfg.max_iters": cfg.train_cfg.max_iters,
            "train_cfg.val_interval": cfg.train_cfg.get("val_interval", 1000),
            "default_hooks.checkpoint.interval": cfg.default_hooks.checkpoint.interval,
        }
        for key, value in counted.items():
            if value > 0 and value % accumulation:
                raise ValueError(f"{key}={value} is not divided by optim_wrapper.accumulative_counts={accumulation}")
    return accumulation


def _scale_lr(cfg: Config, world: World) -> str:
    """The arithmetic of a step, in words. Scales the learning rate if `auto_scale_lr.enable`.

    mmengine does not count accumulation where it scales.
    """
    per_rank, accumulation = cfg.train_dataloader.batch_size, cfg.optim_wrapper.accumulative_counts
    batch, base = world.size * per_rank * accumulation, cfg.auto_scale_lr.get("base_batch_size")
    optimizer = cfg.optim_wrapper.optimizer
    note = ""
    if cfg.auto_scale_lr.enable:
        if not base:
            raise ValueError("auto_scale_lr.enable=true needs auto_scale_lr.base_batch_size in the configuration")
        note = f" (that is {optimizer.lr:g} x {batch}/{base})"
        optimizer.lr *= batch / base
        cfg.auto_scale_lr.enable = False
    elif base and base != batch:
        note = f", which is for {base} images (auto_scale_lr.enable=true makes it {optimizer.lr * batch / base:g})"
    return (
        f"{world.size} ranks x train_dataloader.batch_size={per_rank} x optim_wrapper.accumulative_counts="
        f"{accumulation} = {batch} images a step, learning rate {optimizer.lr:g}{note}"
    )


def _add_hook(cfg: Config, trained_as: dict[str, Any], strict: bool, continues: bool) -> None:
    hook = {"type": ResumeHook.__name__, "trained_as": trained_as, "strict": strict, "continues": continues}
    hook["seed"] = cfg.randomness.seed
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), hook]


def _forget_start(cfg: Config) -> None:
    """What is loaded is the whole model: where its encoder came from may be gone."""
    if "checkpoint" in cfg.model.backbone:
        cfg.model.backbone.checkpoint = None
