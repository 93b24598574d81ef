"""mmengine's FlexibleRunner on DeepSpeed's ZeRO, with model, optimizer and schedules of an mmengine configuration.

A checkpoint is a folder: DeepSpeed's files for each rank, and `weights.pth` in mmengine's usual layout, with the whole
weights, the schedules and the progress of the training. So mmengine's Runner can read what ZeRO wrote, and ZeRO can
start from what the Runner wrote, with `load_from`.
"""

import copy
from pathlib import Path
from typing import Any

import deepspeed
import torch
from mmengine._strategy import BaseStrategy
from mmengine._strategy.deepspeed import DeepSpeedOptimWrapper, MMDeepSpeedEngineWrapper
from mmengine.config import ConfigDict
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import MODEL_WRAPPERS, OPTIM_WRAPPERS, STRATEGIES
from mmengine.runner.checkpoint import _load_checkpoint, _load_checkpoint_to_model
from torch import nn

from downstream.dense.mmengine.console import shorten_console
from pretrain.trainer.checkpoint import first_problem
from pretrain.trainer.deepspeed_files import SafeCheckpointEngine
from pretrain.trainer.engine import gather_state_dict
from pretrain.trainer.launch import World

WEIGHTS = "weights.pth"  # in a checkpoint's folder


@OPTIM_WRAPPERS.register_module()
class ZeroOptimWrapper(DeepSpeedOptimWrapper):
    """Adapts the engine's optimizer to mmengine's loops and schedules."""

    def step(self, **kwargs: Any) -> None:
        """Takes a micro-batch's step; optimizer steps log the gradient norm (if it is clipped) and refusals."""
        last = self.model.is_gradient_accumulation_boundary()
        self.model.step()
        if last and self.model.gradient_clipping():
            norm = self.model.get_global_grad_norm()
            MessageHub.get_current_instance().update_scalar("train/grad_norm", float(norm))
        if last and not self.model.was_step_applied():
            MessageHub.get_current_instance().update_scalar("train/skipped_steps", 1)


@MODEL_WRAPPERS.register_module()
class ZeroModel(MMDeepSpeedEngineWrapper):
    """The engine as the runner's model.

    Under ZeRO-3 it predicts with a whole copy, filled at the start of an evaluation. The engine gathers parameters from
    all ranks on every use, and how often a detector uses them depends on the image: if one rank's image is empty and
    the others' are not, the ranks would wait for each other forever.

    Args:
        engine: DeepSpeed's.
        predictor: the engine's module, or under ZeRO-3 a copy made before partitioning.
    """

    def __init__(self, engine: Any, predictor: nn.Module):
        super().__init__(model=engine)
        self.predictor: Any = predictor

    def train(self, mode: bool = True) -> "ZeroModel":
        self.model.train(mode)
        if self.predictor is not self.model.module:
            self.predictor.to("cpu")
        return self

    @torch.no_grad()
    def eval(self) -> "ZeroModel":
        """Switches to evaluation; all ranks must call it."""
        self.model.eval()
        if self.predictor is not self.model.module:
            self.predictor.to(self.model.device).eval()
            with deepspeed.zero.GatheredParameters(list(self.model.module.parameters())):
                self.predictor.load_state_dict(self.model.module.state_dict())
        return self

    def val_step(self, data: Any) -> list[Any]:
        return list(self.predictor.val_step(data))


@STRATEGIES.register_module()
class ZeroStrategy(BaseStrategy):
    """Builds, saves and resumes what the runner trains.

    mmengine's own DeepSpeedStrategy fails with current versions of DeepSpeed.

    Args:
        settings: all of DeepSpeed's keys (`pretrain.trainer.engine.complete_settings`).
        start: a file in mmengine's layout; the training starts from its weights.
    """

    def __init__(self, *, settings: dict[str, Any], start: str | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.settings, self.start = ConfigDict(settings).to_dict(), start

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        return shorten_console(super().build_logger(*args, **kwargs))

    def prepare(
        self,
        model: nn.Module | dict[str, Any],
        *,
        optim_wrapper: Any = None,
        param_scheduler: Any = None,
        compile: Any = False,
        dispatch_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Builds model, optimizer and schedules for `FlexibleRunner.train`; all ranks must call it."""
        assert optim_wrapper is not None, "mmengine's Runner evaluates"
        self.dispatch_kwargs.update(dispatch_kwargs or {})
        model = self._init_model_weights(self.build_model(model))
        assert isinstance(model, nn.Module)
        if self.start:
            # Before the engine copies or partitions the parameters.
            _load_checkpoint_to_model(model, _load_checkpoint(self.start, map_location="cpu"))
        self.optim_wrapper = self.build_optim_wrapper(
            {**_without_engine_keys(optim_wrapper), "type": "ZeroOptimWrapper"}, model
        )
        optimizer = self.optim_wrapper.optimizer
        optimizer.param_groups = _trainable(optimizer.param_groups)
        stage3 = self.settings.get("zero_optimization", {}).get("stage", 0) == 3
        predictor = copy.deepcopy(model) if stage3 else model
        engine, self.optim_wrapper.optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self.settings
        )
        if stage3:
            _remove_hooks(model)
        # Only now: DeepSpeed counts steps by wrapping the optimizer's `step`, and so do mmengine's schedules.
        self.optim_wrapper.model = engine
        self.model = ZeroModel(engine, predictor)
        if param_scheduler is not None:
            self.param_schedulers = self.build_param_scheduler(param_scheduler, self.optim_wrapper)
        return self._prepared_components()

    def save_checkpoint(
        self,
        filename: str,
        *,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        extra_ckpt: dict[str, Any] | None = None,
        callback: Any = None,
    ) -> None:
        """Writes a folder, or without the optimizer a file with the weights; all ranks must call it.

        Raises:
            OSError: writing failed; raised on all ranks.
        """
        folder, engine = Path(filename), self.model.model
        problem = self._save_engine(folder) if save_optimizer else None
        content = {**(extra_ckpt or {}), "state_dict": gather_state_dict(engine, World(self.rank, self.world_size, 0))}
        content.setdefault("meta", {})["seed"] = self.seed
        if save_optimizer:
            content["optim_wrapper"] = self.optim_state_dict()
        if save_param_scheduler and hasattr(self, "param_schedulers"):
            content["param_schedulers"] = self.scheduler_state_dict()
        if callback is not None:
            callback(content)
        if self.rank == 0 and problem is None:
            try:
                torch.save(content, folder / WEIGHTS if save_optimizer else folder)
            except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
                problem = str(error)
        if problem := first_problem(problem):
            raise OSError(problem)

    def _save_engine(self, folder: Path) -> str | None:
        engine = self.model.model
        engine.checkpoint_engine = files = SafeCheckpointEngine(engine._config)
        engine._copy_recovery_script = lambda folder: None  # on a full disk it would raise on one rank only
        engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        return str(files.failure) if files.failure else None

    def resume(
        self,
        filename: str,
        *,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        map_location: Any = "default",
        callback: Any = None,
    ) -> dict[str, Any]:
        """Resumes from a checkpoint's folder; all ranks must call it.

        Returns:
            The rest of `weights.pth`.
        """
        folder, engine = Path(filename), self.model.model
        content: dict[str, Any] = _load_checkpoint(str(folder / WEIGHTS), map_location="cpu")
        if callback is not None:
            callback(content)
        engine.checkpoint_engine = SafeCheckpointEngine(engine._config)
        path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
        assert path is not None, f"DeepSpeed did not load {folder}"
        self.load_optim_state_dict(content.pop("optim_wrapper"))
        if hasattr(self, "param_schedulers"):
            self.load_scheduler_state_dict(content.pop("param_schedulers"))
        return content

    def load_checkpoint(self, filename: str, **kwargs: Any) -> dict[str, Any]:
        """Raises ValueError: ZeRO has already copied the weights."""
        raise ValueError(f"pass {filename} to the strategy as `start`")


def _without_engine_keys(optim_wrapper: dict[str, Any]) -> dict[str, Any]:
    """mmengine's optimizer wrapper without the keys that the engine handles itself."""
    engine_keys = ("accumulative_counts", "clip_grad", "dtype", "loss_scale")
    return {key: value for key, value in optim_wrapper.items() if key not in engine_keys}


def _remove_hooks(model: nn.Module) -> None:
    """Removes ZeRO-3's hooks from modules without parameters, which have nothing to gather.

    ZeRO-3 raises if ranks do not call the same modules in the same order, and a head calls its losses, which are
    modules, only for images with objects.
    """
    for module in model.modules():
        if next(module.parameters(), None) is None:
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()


def _trainable(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drops frozen parameters and empty groups: DeepSpeed deletes empty groups, but schedules count them."""
    kept = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]
    return [group for group in kept if group["params"]]
