"""Runs a job on all ranks with mmengine's Runner, or FlexibleRunner for ZeRO; resumes and stops like all runs."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import FlexibleRunner, Runner
from mmengine.utils import import_modules_from_strings

from downstream.dense.job import Job
from downstream.dense.mmengine.checkpoint_files import find_weights, last_checkpoint, refuse_pickles
from downstream.dense.mmengine.console import shorten_console
from downstream.dense.mmengine.data_order import by_epoch, shield_workers, wrap_train_data
from downstream.dense.mmengine.dataset_keys import datasets
from downstream.dense.mmengine.encoder_start import check_start, clear_start
from downstream.dense.mmengine.hooks import DurableCheckpointHook, Fp32OutputsHook, ResumeHook, plain_numbers
from downstream.dense.mmengine.strategy import ZeroStrategy
from pretrain.trainer.checkpoint import first_problem
from pretrain.trainer.engine import complete_settings, zero_stage
from pretrain.trainer.engine_file import OWNED, read_ds_config
from pretrain.trainer.launch import World

_log = logging.getLogger(__name__)

# Keys of DeepSpeed that the configuration or the command owns.
_OWNED = OWNED | {
    "train_batch_size": "train_dataloader.batch_size",
    "train_micro_batch_size_per_gpu": "train_dataloader.batch_size",
    "gradient_accumulation_steps": "optim_wrapper.accumulative_counts",
    "gradient_clipping": "optim_wrapper.clip_grad",
    "optimizer": "optim_wrapper.optimizer",
    "scheduler": "param_scheduler",
    "activation_checkpointing": "model.backbone.grad_checkpointing",
}


def run(job: Job, world: World, check: Callable[[Config, list[str]], list[str]]) -> None:
    """Trains, or evaluates a checkpoint; call it after `init_distributed`.

    Args:
        check: (configuration, splits) -> a line about each data set; called on the main rank. It raises ValueError
            if something is wrong with the configuration or the data.

    Raises:
        ValueError: from `check`, or settings and checkpoint do not fit together.
        Stopped: a signal arrived, and everything is saved.
        OSError: a checkpoint could not be written.
    """
    refuse_pickles()
    cfg = copy.deepcopy(job.cfg)
    if imports := cfg.get("custom_imports"):
        import_modules_from_strings(**imports)
    splits = ["test"] if job.test else ["train", "val"] if cfg.get("val_dataloader") else ["train"]
    if not job.test and not (job.resume and last_checkpoint(cfg.work_dir)):
        _on_main(world, lambda: check_start(cfg))
    _on_main(world, lambda: _log.info("%s", "\n".join(check(cfg, splits))))
    if job.test:
        _test(cfg, job.test, job.tta, world)
    else:
        _train(cfg, job, world)


def _on_main(world: World, function: Callable[[], None]) -> None:
    """Calls a function on the main rank; if it fails there, all ranks raise ValueError."""
    problem = None
    if world.is_main:
        try:
            function()
        except (ValueError, OSError) as error:
            problem = str(error)
    if problem := first_problem(problem):
        raise ValueError(problem)


def _test(cfg: Config, checkpoint: str, tta: bool, world: World) -> None:
    """Evaluates and prints the metrics of `test_evaluator` as a JSON object, in the last line."""
    cfg.load_from, cfg.resume = find_weights(checkpoint), False
    clear_start(cfg)
    if tta:
        _augment_test(cfg)
    _add_hook(cfg, {}, strict=True, resumes=False)
    metrics = _plain_runner(cfg, world).test()
    if world.is_main:
        print(json.dumps(plain_numbers(metrics)), flush=True)


def _augment_test(cfg: Config) -> None:
    if not (cfg.get("tta_model") and cfg.get("tta_pipeline")):
        raise ValueError("tta=true needs tta_model and tta_pipeline in the configuration")
    for _, dataset in datasets(cfg, "test"):
        dataset.pipeline = cfg.tta_pipeline
    # Otherwise mmengine would use the top-level one of mmseg's configurations.
    preprocessor = cfg.model.get("data_preprocessor")
    cfg.model = {**cfg.tta_model, "module": cfg.model, "data_preprocessor": preprocessor}


def _train(cfg: Config, job: Job, world: World) -> None:
    last = last_checkpoint(cfg.work_dir) if job.resume else None
    if last is not None and last.is_dir() != bool(job.ds_config):
        raise ValueError(
            f"{cfg.work_dir} was trained {'with' if last.is_dir() else 'without'} train.ds_config=: continue it the "
            f"same way, or start a new run with another name= and load_from={cfg.work_dir}"
        )
    settings = _ds_settings(cfg, job.ds_config, world) if job.ds_config else None
    if settings is None and cfg.optim_wrapper.type == "AmpOptimWrapper" and not torch.cuda.is_available():
        raise ValueError(
            "mmengine's bf16 needs a GPU: give train.precision=fp32, or train.ds_config=zero1, which has it on CPUs too"
        )
    accumulation = _check_steps(cfg)
    batch_line = _scale_lr(cfg, world)
    as_given = copy.deepcopy(cfg)
    # mmengine would draw another seed after each stop; ResumeHook seeds ranks differently.
    cfg.randomness.update(seed=cfg.randomness.seed or 0, diff_rank_seed=False)
    wrap_train_data(cfg)
    shield_workers(cfg)
    hook = cfg.default_hooks.checkpoint
    hook.update(type=DurableCheckpointHook.__name__, accumulation=accumulation, suffix="" if settings else ".pth")
    hook.by_epoch = by_epoch(cfg)
    _add_hook(cfg, _resume_signature(cfg, settings, world), strict=last is not None, resumes=last is not None)
    if cfg.optim_wrapper.type == "AmpOptimWrapper":
        cfg.custom_hooks.append({"type": Fp32OutputsHook.__name__})
    if last is not None:
        clear_start(cfg)
    start = find_weights(cfg.load_from) if cfg.load_from and last is None else None
    cfg.resume, cfg.load_from = last is not None, str(last) if last else start
    runner = _zero_runner(cfg, settings, start) if settings else _plain_runner(cfg, world)
    if world.is_main:
        origin = f"continues from {last}" if last else f"starts from the weights in {start}" if start else "starts"
        _log.info("%s; %s", batch_line, origin)
        as_given.dump(Path(cfg.work_dir) / "config.py")  # replaces mmengine's dump, which has everything added here
    runner.train()


def _resume_signature(cfg: Config, settings: dict[str, Any] | None, world: World) -> dict[str, Any]:
    """The settings that a resumed training must share with its checkpoint."""
    return {
        "train.ds_config": f"ZeRO {zero_stage(settings)}" if settings else "none",
        "the number of ranks": world.size,
        "train_dataloader.batch_size": cfg.train_dataloader.batch_size,
        "optim_wrapper.accumulative_counts": cfg.optim_wrapper.accumulative_counts,
        "optim_wrapper.type": cfg.optim_wrapper.type,
        # The checkpoint has these two as well, and its values would silently win.
        "optim_wrapper.optimizer": str(cfg.optim_wrapper.optimizer),
        "param_scheduler": str(cfg.get("param_scheduler")),
        "randomness.seed": cfg.randomness.seed,
    }


def _plain_runner(cfg: Config, world: World) -> Runner:
    """A Runner in the existing process group; mmengine would create one itself, which fails on CPUs."""
    cfg.launcher = "pytorch" if world.size > 1 else "none"
    if not torch.cuda.is_available():
        cfg.model_wrapper_cfg = {
            "type": "MMDistributedDataParallel",
            "broadcast_buffers": False,
            "find_unused_parameters": cfg.find_unused_parameters,
            "device_ids": None,  # mmengine defaults to GPUs
        }
    return _PlainRunner.from_cfg(cfg)


class _PlainRunner(Runner):
    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        return shorten_console(super().build_logger(*args, **kwargs))


def _zero_runner(cfg: Config, settings: dict[str, Any], start: str | None) -> FlexibleRunner:
    cfg.launcher = "pytorch"
    cfg.setdefault("env_cfg", {})
    cfg.strategy = {"type": ZeroStrategy.__name__, "settings": settings, "start": start}
    if not cfg.resume:
        cfg.load_from = None
    return FlexibleRunner.from_cfg(cfg)


def _ds_settings(cfg: Config, ds_config: str, world: World) -> dict[str, Any]:
    """All of DeepSpeed's keys.

    Raises:
        ValueError: from `read_ds_config`, or settings that only mmengine's Runner supports.
    """
    clip = dict(cfg.optim_wrapper.clip_grad or {})
    if clip and (clip.get("type", "norm") != "norm" or float(clip.get("norm_type", 2)) != 2):
        raise ValueError(f"optim_wrapper.clip_grad={clip}: DeepSpeed clips gradients only by their L2 norm")
    if cfg.get("compile"):
        raise ValueError("compile needs mmengine's Runner: delete it, or leave out train.ds_config")
    if any(hook["type"] == "EMAHook" for hook in cfg.get("custom_hooks") or []):
        # It copies parameters, which ZeRO-3 partitions, and FlexibleRunner loads checkpoints before the hook is ready.
        raise ValueError("EMAHook needs mmengine's Runner: delete it from custom_hooks, or leave out train.ds_config")
    keys = read_ds_config(ds_config, _OWNED)
    if not zero_stage(keys):
        raise ValueError(
            f"train.ds_config={ds_config} is ZeRO stage 0, which is what mmengine's Runner does: leave out "
            f"train.ds_config"
        )
    return complete_settings(
        keys,
        micro_batch=cfg.train_dataloader.batch_size,
        accumulation=cfg.optim_wrapper.accumulative_counts,
        world_size=world.size,
        clip_grad=float(clip.get("max_norm", 0.0)),
        bf16=cfg.optim_wrapper.type == "AmpOptimWrapper",
    )


def _check_steps(cfg: Config) -> int:
    """The micro-batches per optimizer step; raises ValueError if they do not divide settings counted in iterations."""
    accumulation = int(cfg.optim_wrapper.accumulative_counts)
    if not by_epoch(cfg):
        counted = {
            "train_cfg.max_iters": cfg.train_cfg.max_iters,
            "train_cfg.val_interval": cfg.train_cfg.get("val_interval", 1000),
            "default_hooks.checkpoint.interval": cfg.default_hooks.checkpoint.interval,
        }
        for key, value in counted.items():
            if value > 0 and value % accumulation:
                raise ValueError(f"{key}={value} is not a multiple of optim_wrapper.accumulative_counts={accumulation}")
    return accumulation


def _scale_lr(cfg: Config, world: World) -> str:
    """Scales the learning rate if `auto_scale_lr.enable`; returns a line with the batch size and learning rate.

    mmengine's own scaling ignores accumulation.
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


def _add_hook(cfg: Config, signature: dict[str, Any], strict: bool, resumes: bool) -> None:
    hook = {"type": ResumeHook.__name__, "signature": signature, "strict": strict, "resumes": resumes}
    hook["seed"] = cfg.randomness.seed
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), hook]
