"""Hooks of mmengine's runners that make a training resume exactly, save without losing anything, and stop."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.utils import apply_to
from torch import Tensor

from pretrain.trainer.append import append
from pretrain.trainer.attempt import mark_attempt
from pretrain.trainer.checkpoint import first_problem
from pretrain.trainer.durable import rename, sync_all, write_durably
from pretrain.trainer.metrics import read_metrics
from pretrain.trainer.seed import seed_step
from pretrain.trainer.signals import Stopped, StopRequest

# mmdet calls its heads as modules; mmseg calls a head's `forward` directly, and the last module in it is conv_seg.
FP32_OUTPUTS = ("neck", "rpn_head", "bbox_head", "mask_head", "conv_seg")


@HOOKS.register_module()
class ResumeHook(Hook):
    """Seeds forward passes by iteration and rank, and continues from the iteration of the checkpoint.

    Args:
        seed: of the training.
        signature: settings that must not change when a training is resumed; saved in its checkpoints.
        strict: whether a loaded checkpoint must hold the whole model (to continue from it or to test it).
        resumes: whether a training is resumed.
    """

    priority = "LOWEST"  # a missed evaluation runs when all other hooks are ready

    def __init__(self, seed: int, signature: dict[str, Any], strict: bool, resumes: bool):
        self.seed, self.strict, self.resumes = seed, strict, resumes
        self.signature = dict(signature)  # a plain dict, because it is saved

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError, naming the differences, if the checkpoint belongs to another training or model."""
        if self.resumes:
            check_signature(checkpoint["meta"].get("resume_signature", {}), self.signature, runner.work_dir)
        if self.strict:
            check_model(checkpoint["state_dict"], _unwrap(runner.model))

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["meta"]["resume_signature"] = self.signature

    def before_train(self, runner: Any) -> None:
        batches = runner.train_dataloader.batch_sampler
        batches.start = runner.iter - (0 if batches.infinite else runner.epoch * len(batches))
        if batches.start == 0 or batches.infinite:
            _evaluate_missed(runner, runner.iter if batches.infinite else runner.epoch)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        seed_step(self.seed, runner.iter, 0, runner.rank)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        if runner.rank == 0:
            record = {"epoch": runner.epoch, "iter": runner.iter, **plain_numbers(metrics or {})}
            append(_evaluations(runner), json.dumps(record) + "\n")


def plain_numbers(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Metrics as floats (mmseg returns numpy's); None if not finite, such as the IoU of a class without pixels."""
    numbers = {name: float(value) for name, value in metrics.items()}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _evaluations(runner: Any) -> Path:
    return Path(runner.work_dir) / "evaluation.jsonl"


def _evaluate_missed(runner: Any, done: int) -> None:
    """Runs the evaluation that a kill or a signal prevented; `done` counts epochs or iterations, like the loop."""
    loop = runner.train_loop
    last = runner.iter == runner.max_iters
    if runner.val_loop is None or not done or done < loop.val_begin or (done % loop.val_interval and not last):
        return
    evaluated = [any(record["iter"] == runner.iter for record in read_metrics(_evaluations(runner), "iter"))]
    dist.broadcast_object_list(evaluated)  # the main rank's file counts
    if not evaluated[0]:
        runner.val_loop.run()


def check_signature(before: dict[str, Any], now: dict[str, Any], work_dir: str) -> None:
    """Raises ValueError, naming every difference, if a checkpoint belongs to another training."""
    different = [
        f"{key} was {before.get(key, 'unset')!r} and is {value!r}"
        for key, value in now.items()
        if before.get(key) != value
    ]
    if different:
        raise ValueError(
            f"the checkpoint in {work_dir} belongs to another training: {'; '.join(different)}; restore these, or "
            f"start a new run with another name= (and load_from={work_dir}, to start from its weights)"
        )


def check_model(state: dict[str, Any], model: Any) -> None:
    """Raises ValueError if a checkpoint's tensors are not the model's; mmengine would just load those that fit."""
    # Under ZeRO-3 a parameter is empty; an attribute has its full shape.
    expected = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.state_dict(keep_vars=True).items()}
    found = {name.removeprefix("module."): tuple(tensor.shape) for name, tensor in state.items()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not in this model" for name in found if name not in expected]
    problems += [
        f"{name} has shape {found[name]}, not {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"the checkpoint does not match the model: {'; '.join(problems[:3])}{more}")


def _unwrap(model: Any) -> Any:
    """The model inside the wrappers for several ranks and for test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


@HOOKS.register_module()
class Fp32OutputsHook(Hook):
    """Makes necks and heads return fp32 under bf16 autocast.

    mmdet casts boxes to the type of the features that it crops; in bf16 that rounds 1000 pixels to multiples of 4. It
    sorts proposals by the sigmoid of their logits; in bf16 many good ones would be equal. mmcv's operators do not
    support bf16. mmseg resizes logits before it takes the largest. Inside these modules autocast works as before.
    """

    def before_train(self, runner: Any) -> None:
        for name, module in _unwrap(runner.model).named_modules():
            if name.split(".")[-1] in FP32_OUTPUTS:
                module.register_forward_hook(_to_fp32)


def _to_fp32(module: Any, inputs: Any, outputs: Any) -> Any:
    return apply_to(outputs, lambda value: isinstance(value, Tensor), lambda tensor: tensor.float())


@HOOKS.register_module()
class DurableCheckpointHook(CheckpointHook):
    """A CheckpointHook that saves and stops on a signal, and that loses no older checkpoint if killed while saving.

    mmengine deletes an old checkpoint before it writes the new one, and overwrites the file that names the newest. Here
    a checkpoint is written under a temporary name, moved into place and recorded as the newest; only then are old ones
    deleted.

    Args:
        accumulation: micro-batches per optimizer step; a checkpoint cannot hold a partial step.
        suffix: of the checkpoints' names.
    """

    def __init__(self, accumulation: int, suffix: str, **kwargs: Any):
        super().__init__(**kwargs)
        self.accumulation, self.suffix = accumulation, suffix

    def before_train(self, runner: Any) -> None:
        super().before_train(runner)
        self.stop = StopRequest()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        batches, done = runner.train_dataloader.batch_sampler, runner.iter + 1
        if done % self.accumulation or (not batches.infinite and done % len(batches) == 0):
            return  # at the end of an epoch, `after_train_epoch` stops it once the epoch's work is done
        self._stop_on_signal(runner, done, f"iter_{done}", by_epoch=False)

    def after_train_epoch(self, runner: Any) -> None:
        super().after_train_epoch(runner)
        if not runner.train_dataloader.batch_sampler.infinite:
            self._stop_on_signal(runner, runner.iter, f"epoch_{runner.epoch + 1}", by_epoch=True)

    def _stop_on_signal(self, runner: Any, done: int, name: str, by_epoch: bool) -> None:
        signal = self.stop.agreed()
        if not signal or done == runner.max_iters:
            return
        if self.last_ckpt is None or Path(self.last_ckpt).stem != name:
            self._publish(runner, name, {}, by_epoch)
        again = "run the same command again to continue"
        raise Stopped(f"{signal}: saved and stopped after step {done} of {runner.max_iters}; {again}")

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        self._publish(runner, f"{'epoch' if self.by_epoch else 'iter'}_{step}", meta, self.by_epoch)

    def _publish(self, runner: Any, name: str, meta: dict[str, Any], by_epoch: bool) -> None:
        """Writes a checkpoint; all ranks must call it. Raises OSError on all ranks if writing fails."""
        folder = Path(self.out_dir)
        temporary, path = folder / "unfinished", folder / f"{name}{self.suffix}"
        self.last_ckpt = str(path)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        if runner.rank == 0:
            _remove(temporary)
        dist.barrier()
        problem = None
        try:
            runner.save_checkpoint(str(folder), temporary.name, meta=meta, by_epoch=by_epoch)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            problem = str(error)
        problem = first_problem(problem)
        if problem is None and runner.rank == 0:
            try:
                sync_all(temporary)
                _remove(path)  # it exists if the training fell back to an older checkpoint
                rename(temporary, path)
                write_durably(Path(runner.work_dir) / "last_checkpoint", str(path))
                self._delete_old(folder)
                mark_attempt("saved")
            except OSError as error:
                problem = str(error)
        if problem := first_problem(problem):
            again = "make room and run the same command again to continue"
            raise OSError(f"checkpoint {path} could not be written: {problem}; {again}")

    def _delete_old(self, folder: Path) -> None:
        if self.max_keep_ckpts <= 0:
            return
        saved = [p for p in folder.iterdir() if re.fullmatch(r"(epoch|iter)_\d+(\.pth)?", p.name)]
        for path in sorted(saved, key=lambda p: p.stat().st_mtime)[: -self.max_keep_ckpts]:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
