"""The step loop of every training."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from data.batch import Batch, Skipped
from data.loader import Loader
from data.waiting import while_waiting
from pretrain.trainer.checkpoint import Checkpoints
from pretrain.trainer.checkpoint_layout import TrainState
from pretrain.trainer.config import RunConfig
from pretrain.trainer.ema import NoEMA
from pretrain.trainer.launch import World
from pretrain.trainer.loggers import Loggers, build_loggers
from pretrain.trainer.metrics import Meter, read_metrics, varying_size
from pretrain.trainer.nonfinite import Diverged, applied_later, list_samples, poison_nonfinite
from pretrain.trainer.optim import learning_rate, set_learning_rate
from pretrain.trainer.phases import limited, report_if_slow
from pretrain.trainer.prefetch import prefetch
from pretrain.trainer.run_folder import RunFolder
from pretrain.trainer.sample_record import SampleRecord
from pretrain.trainer.saver import Saver
from pretrain.trainer.seed import seed_step
from pretrain.trainer.signals import Stopped, StopRequest
from pretrain.trainer.skipped_images import SkippedImages

_log = logging.getLogger(__name__)


@dataclass
class Evaluation:
    """What is measured during training.

    Attributes:
        every_epochs: epochs between measurements; the end of training is measured as well.
        measure: called by all ranks together, between steps, with the engine and the moving average; returns the same
            on all ranks: numbers, and perhaps words about them.
    """

    every_epochs: int
    measure: Callable[[Any, NoEMA], Mapping[str, float | str]]


@dataclass(frozen=True)
class TakenStep:
    """An optimizer step that `state` has not counted yet: it may not have changed the weights."""

    step: int
    keys: list[str]  # of this rank's samples
    applied: Callable[[], bool]  # from `applied_later`


@dataclass
class Run:
    """All parts of a run, and its state.

    Attributes:
        taken: the last step, until `_settle` has counted it in `state`.
    """

    config: RunConfig
    world: World
    device: torch.device
    folder: RunFolder
    loader: Loader
    engine: Any
    ema: NoEMA
    checkpoints: Checkpoints
    state: TrainState
    evaluation: Evaluation | None = None
    taken: TakenStep | None = None

    @cached_property
    def skipped(self) -> SkippedImages:
        train, epoch = self.config.train, self.loader.steps_per_epoch
        return SkippedImages(
            self.folder.skipped_images,
            self.config.data.max_skipped_images,
            epoch * train.global_batch_size // self.world.size,
        )

    @cached_property
    def record(self) -> SampleRecord | None:
        return SampleRecord(self.folder.samples, self.world, self.state.step) if self.config.log.samples else None

    @property
    def end(self) -> int:
        """The end of the order, whose steps are those of the run plus `state.offset`."""
        return self.config.train.epochs * self.loader.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.end - self.state.offset

    @property
    def position(self) -> int:
        """The step of the order that comes next."""
        return self.state.step + self.state.offset

    @property
    def epoch(self) -> float:
        return self.position / self.loader.steps_per_epoch

    @property
    def scheduled(self) -> int:
        """The update number that schedules use."""
        return max(self.state.updates + self.state.offset, 0)

    @property
    def progress(self) -> float:
        """The share of the run that is done, by updates."""
        return self.scheduled / self.end

    @property
    def size_changes(self) -> bool:
        """Whether the images of the next step have another size than those of the last step."""
        return any(begin == self.position for begin, _ in self.loader.sizes[1:])


def train(run: Run) -> None:
    """Trains from `run.state` to the end, and saves there.

    Raises:
        Stopped: a signal came, and the state after that step is saved.
        Diverged: `train.max_nonfinite_steps` steps in a row were skipped for a non-finite gradient.
        ValueError: more images than `data.max_skipped_images` could not be decoded.
        OSError: the last checkpoint, at the end or on a signal, could not be written.
    """
    config, state, total = run.config, run.state, run.total_steps
    with report_if_slow("starting the step loop"):
        stop, meter, saver = StopRequest(), Meter(), Saver(run.checkpoints, run.world.is_main, state.step)
        loggers = build_loggers(config, run.folder, state.step, total, run.world.is_main)
    batches = prefetch(run.loader.batches(run.position, run.end), run.device)
    look = while_waiting(lambda: _stop_while_waiting(run, stop, saver))
    with (
        contextlib.closing(loggers),
        contextlib.closing(saver),
        contextlib.closing(batches),
        look,
        contextlib.ExitStack() as starting,
    ):
        _evaluate(run, loggers, meter)  # if the run was killed or stopped before it could
        starting.enter_context(
            report_if_slow("the first step, including the first images and compiling", "first_step_minutes")
        )
        limit = "first_step_minutes"
        while state.step < total:
            with limited(f"step {state.step + 1}", limit):
                lr = _step(run, batches, meter)
                signal = stop.agreed()
            limit = "step_minutes"
            starting.close()
            loggers.step()
            saver.poll()
            last = bool(signal) or state.step == total
            # No logged speed mixes two sizes.
            logs = last or state.step % config.log.every_steps == 0 or run.size_changes
            saves = last or state.step % config.checkpoint.every_steps == 0
            with limited(f"the outcome and metrics of step {state.step}", "step_minutes"):
                if logs or saves or _evaluates(run) or run.ema.model is not None:
                    _settle(run)
                if logs:
                    loggers.log_metrics({**_metrics(run, meter, lr), **saver.metrics()})
                    meter.reset()
            if saves:
                _save(run, saver, required=last)
            if signal and state.step < total:
                raise _stopped(run, signal)
            if run.size_changes:
                _log.info("from step %d on, images are %dx%d", state.step, *run.loader.size_at(run.position))
                limit = "first_step_minutes"
                starting.enter_context(report_if_slow("the first step at this size, including compiling", limit))
            _evaluate(run, loggers, meter)


def _stop_while_waiting(run: Run, stop: StopRequest, saver: Saver) -> None:
    """Saves and raises Stopped if a signal came and all ranks wait for data, which may never come."""
    signal = stop.agreed_while_waiting(run.state.step)
    if signal:
        _settle(run)
        _save(run, saver, required=True)
        stopped = _stopped(run, f"{signal} while waiting for data")
        stopped.lacks_data = True
        raise stopped


def _save(run: Run, saver: Saver, required: bool) -> None:
    if run.world.is_main:
        run.folder.check_in_place()
    saver.save(run.engine, run.ema, run.state, required)


def _stopped(run: Run, why: str) -> Stopped:
    step = f"saved and stopped after step {run.state.step} of {run.total_steps}"
    done = step if run.state.step else "stopped before the first step, with nothing to save"
    return Stopped(f"{why}: {done}; run the same command again to continue")


def _step(run: Run, batches: Iterator[tuple[Batch, float]], meter: Meter) -> float:
    """Takes one optimizer step, whose outcome is still pending in `run.taken`; returns its learning rate."""
    config, engine, state = run.config, run.engine, run.state
    accumulation = config.train.gradient_accumulation_steps
    keys: list[str] = []
    skipped: list[Skipped] = []
    waited = 0.0
    for number in range(accumulation):
        batch, seconds = next(batches)
        keys, skipped, waited = [*keys, *batch.keys], [*skipped, *batch.skipped], waited + seconds
        if run.record:
            run.record.add(batch)
        seed_step(config.seed, state.step, number, run.world.rank)
        losses = engine(batch.images, **batch.model_inputs(), **run.ema.model_inputs(batch.images))
        meter.add_losses(losses)
        engine.backward(poison_nonfinite(losses["loss"]))
        if number == accumulation - 1:
            _settle(run)  # as late as possible: the learning rate depends on it
            lr = learning_rate(
                run.scheduled, run.loader.steps_per_epoch, config.train.epochs, config.peak_lr, config.optim
            )
            set_learning_rate(engine.optimizer.param_groups, lr)
        engine.step()
    state.step += 1
    state.samples += config.train.global_batch_size
    if run.record:
        run.record.write(state.step)
    run.taken = TakenStep(state.step, keys, applied_later(engine))
    meter.add_step(config.train.global_batch_size, waited, run.skipped.add(skipped, len(keys)))
    return lr


def _settle(run: Run) -> None:
    """Counts the last step, if it is not counted yet; if the optimizer skipped it, records its samples.

    Nothing waits for the device's answer before that. Called by all ranks together.
    """
    taken, run.taken = run.taken, None
    if taken is None:
        return
    state, train = run.state, run.config.train
    if taken.applied():
        state.updates += 1
        state.consecutive_nonfinite = 0
        run.ema.update(run.progress)
        return
    state.consecutive_nonfinite += 1
    list_samples(run.folder.nonfinite, taken.step, taken.keys, run.world)
    count = state.consecutive_nonfinite
    _log.warning("step %d: the gradient is not finite; the weights are unchanged (%d in a row)", taken.step, count)
    if count >= train.max_nonfinite_steps:
        raise Diverged(
            f"{count} steps in a row had a non-finite gradient (train.max_nonfinite_steps); their samples are "
            f"in {run.folder.nonfinite}: check those images, lower optim.base_lr, or set train.precision=fp32"
        )


def _metrics(run: Run, meter: Meter, lr: float) -> dict[str, Any]:
    state = run.state
    return {
        "step": state.step,
        "epoch": run.epoch,
        **meter.read(),
        **varying_size(run.loader, run.position - 1),
        "lr": lr,
        "grad_norm": float(run.engine.get_global_grad_norm()),
        "skipped_steps": state.step - state.updates,
    }


def _evaluates(run: Run) -> bool:
    """Whether an evaluation is due after this step."""
    if run.evaluation is None or run.state.step == 0:
        return False
    every = run.evaluation.every_epochs * run.loader.steps_per_epoch
    return run.position % every == 0 or run.state.step == run.total_steps


def _evaluate(run: Run, loggers: Loggers, meter: Meter) -> None:
    """Evaluates if it is due and not done yet; the time it takes does not count as training time."""
    state, evaluation = run.state, run.evaluation
    if evaluation is None or not _evaluates(run):
        return
    measured = [state.step in (row["step"] for row in read_metrics(run.folder.evaluation))]
    torch.distributed.broadcast_object_list(measured)  # the main rank's file counts
    if not measured[0]:
        start = time.perf_counter()
        with limited(f"the evaluation after step {state.step}", "evaluation_minutes"):
            values = evaluation.measure(run.engine, run.ema)
        loggers.log_evaluation({"step": state.step, "epoch": run.epoch, **values})
        meter.exclude(time.perf_counter() - start)
