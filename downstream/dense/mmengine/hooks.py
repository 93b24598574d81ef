"""Hooks of mmengine's runners: what makes a training continue exactly, save without losing anything, and stop."""

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

from pretrain.trainer.checkpoint import first_problem, write_durably
from pretrain.trainer.loop import seed_step
from pretrain.trainer.signals import Stopped, StopRequest

# mmdet's heads are called as modules; mmseg calls the `forward` of a head itself, and the last thing in it is conv_seg.
BORDERS = ("neck", "rpn_head", "bbox_head", "mask_head", "conv_seg")


@HOOKS.register_module()
class ResumeHook(Hook):
    """Seeds forward passes by where they are, and continues where the checkpoint was.

    Args:
        seed: of the training.
        trained_as: what must be the same when a training continues; it is kept in its checkpoints.
        strict: whether what is loaded must be the whole model (a checkpoint to continue from or to test).
        continues: whether a training continues.
    """

    priority = "LOWEST"  # a missed evaluation is measured when all other hooks are ready

    def __init__(self, seed: int, trained_as: dict[str, Any], strict: bool, continues: bool):
        self.seed, self.strict, self.continues = seed, strict, continues
        self.trained_as = dict(trained_as)  # no mmengine type: it is saved

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError, naming what differs, where the checkpoint is of another training or model."""
        if self.continues:
            before = checkpoint["meta"].get("trained_as", {})
            check_same(before, self.trained_as, runner.work_dir)
        if self.strict:
            check_model(checkpoint["state_dict"], _unwrap(runner.model))

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["meta"]["trained_as"] = self.trained_as

    def before_train(self, runner: Any) -> None:
        batches = runner.train_dataloader.batch_sampler
        batches.first = runner.iter - (0 if batches.endless else runner.epoch * len(batches))
        if batches.first == 0 or batches.endless:
            _evaluate_missed(runner, runner.iter if batches.endless else runner.epoch)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        seed_step(self.seed, runner.iter, 0, runner.rank)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        if runner.rank == 0:
            row = {"epoch": runner.epoch, "iter": runner.iter, **plain_numbers(metrics or {})}
            with _evaluations(runner).open("a") as file:
                file.write(json.dumps(row) + "\n")


def plain_numbers(metrics: dict[str, Any]) -> dict[str, float | None]:
    """What JSON has words for: mmseg's are of numpy; None for what is not finite, a class without any pixel."""
    numbers = {name: float(value) for name, value in metrics.items()}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def _evaluations(runner: Any) -> Path:
    return Path(runner.work_dir) / "evaluation.jsonl"


def _evaluate_missed(runner: Any, turn: int) -> None:
    """What a kill or a signal kept from being measured. `turn` counts epochs or iterations, as the loop does."""
    loop = runner.train_loop
    last = runner.iter == runner.max_iters
    if runner.val_loop is None or not turn or turn < loop.val_begin or (turn % loop.val_interval and not last):
        return
    file = _evaluations(runner)
    rows = file.read_text().splitlines() if file.is_file() else []
    measured = [runner.iter in (json.loads(row)["iter"] for row in rows)]
    dist.broadcast_object_list(measured)  # the main rank's file counts
    if not measured[0]:
        runner.val_loop.run()


def check_same(before: dict[str, Any], now: dict[str, Any], work_dir: str) -> None:
    """Raises ValueError, naming every difference, where a checkpoint was trained as something else."""
    different = [
        f"{key} was {before.get(key, 'unset')!r} and is {value!r}"
        for key, value in now.items()
        if before.get(key) != value
    ]
    if different:
        raise ValueError(
            f"the checkpoint in {work_dir} is of another training: {'; '.join(different)}; set these back, or start "
            f"anew with another work_dir= (and with load_from={work_dir} from its weights)"
        )


def check_model(state: dict[str, Any], model: Any) -> None:
    """Raises ValueError where a checkpoint's tensors are not the model's: mmengine would load what fits."""
    # ZeRO-3 leaves a parameter's own shape empty and keeps the whole one beside it.
    whole = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.state_dict(keep_vars=True).items()}
    theirs = {name.removeprefix("module."): tuple(tensor.shape) for name, tensor in state.items()}
    problems = [f"{name} is missing" for name in whole if name not in theirs]
    problems += [f"{name} is not of this model" for name in theirs if name not in whole]
    problems += [
        f"{name} is {theirs[name]} and should be {shape}"
        for name, shape in whole.items()
        if theirs.get(name, shape) != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"the checkpoint is of another model: {'; '.join(problems[:3])}{more}")


def _unwrap(model: Any) -> Any:
    """The model itself, of what wraps it for ranks and for augmented tests."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


@HOOKS.register_module()
class Fp32OutputsHook(Hook):
    """Under bf16's autocast, necks and heads hand over fp32.

    mmdet casts the boxes of regions to the type of the features that it cuts there: in bf16 that rounds 1000 pixels to
    multiples of 4. It sorts proposals by the sigmoid of their logits: in bf16 many good ones would be equal. mmcv's ops
    know no bf16 at all. mmseg resizes logits before it looks for the largest. Inside of these modules autocast goes on
    as before.
    """

    def before_train(self, runner: Any) -> None:
        for name, module in _unwrap(runner.model).named_modules():
            if name.split(".")[-1] in BORDERS:
                module.register_forward_hook(_hand_over)


def _hand_over(module: Any, inputs: Any, outputs: Any) -> Any:
    return apply_to(outputs, lambda value: isinstance(value, Tensor), lambda tensor: tensor.float())


@HOOKS.register_module()
class DurableCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, by which a kill loses nothing older, and which saves and stops on a signal.

    mmengine deletes an old checkpoint before it writes the new one, and overwrites the file that names the newest. Here
    a checkpoint is written aside and moved into place, then named, and only then an old one is deleted.

    Args:
        accumulation: micro-batches of an optimiser step: a checkpoint cannot hold a part of one.
        suffix: of checkpoints' names.
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
        if done % self.accumulation or (not batches.endless and done % len(batches) == 0):
            return  # an epoch's end has its own place to stop, where all that belongs to it has been done
        self._stop_if_told(runner, done, f"iter_{done}", by_epoch=False)

    def after_train_epoch(self, runner: Any) -> None:
        super().after_train_epoch(runner)
        if not runner.train_dataloader.batch_sampler.endless:
            self._stop_if_told(runner, runner.iter, f"epoch_{runner.epoch + 1}", by_epoch=True)

    def _stop_if_told(self, runner: Any, done: int, name: str, by_epoch: bool) -> None:
        signal = self.stop.agreed()
        if not signal or done == runner.max_iters:
            return
        if self.last_ckpt is None or Path(self.last_ckpt).stem != name:
            self._publish(runner, name, {}, by_epoch)
        # slurm/_train.sh looks for these words
        raise Stopped(f"{signal}: saved and stopped after step {done} of {runner.max_iters}; run it again to go on")

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        self._publish(runner, f"{'epoch' if self.by_epoch else 'iter'}_{step}", meta, self.by_epoch)

    def _publish(self, runner: Any, name: str, meta: dict[str, Any], by_epoch: bool) -> None:
        """Writes a checkpoint; all ranks together. Raises OSError, on all of them, where the disk does not take it."""
        folder = Path(self.out_dir)
        aside, path = folder / "unfinished", folder / f"{name}{self.suffix}"
        self.last_ckpt = str(path)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        if runner.rank == 0:
            _remove(aside)
        dist.barrier()
        problem = None
        try:
            runner.save_checkpoint(str(folder), aside.name, meta=meta, by_epoch=by_epoch)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            problem = str(error)
        problem = first_problem(problem)
        if problem is None and runner.rank == 0:
            try:
                _remove(path)  # the same place again, after a fallback to an older one
                aside.rename(path)
                write_durably(Path(runner.work_dir) / "last_checkpoint", str(path))
                self._delete_old(folder)
            except OSError as error:
                problem = str(error)
        if problem := first_problem(problem):
            raise OSError(f"checkpoint {path} could not be written: {problem}; make room and give the command again")

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
