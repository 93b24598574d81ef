"""The one step loop, for every method."""

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from data.loader import Batch, Loader
from pretrain.average import Average, NoAverage
from pretrain.checkpoint import Checkpoints, TrainState
from pretrain.config import RunConfig
from pretrain.faults import Diverged, Stopped, StopRequest, log_nonfinite, poison_nonfinite
from pretrain.launch import World
from pretrain.metrics import Meter, NoReporter, Reporter, read_metrics
from pretrain.optim import learning_rate, set_learning_rate
from pretrain.runfolder import RunFolder

T = TypeVar("T")


@dataclass
class Evaluation:
    """What is measured while training goes on.

    Attributes:
        every: in steps; the end of training is measured as well.
        measure: called by all ranks together, between steps; returns the same numbers on all of them.
    """

    every: int
    measure: Callable[[], dict[str, float]]


@dataclass
class Run:
    """What the loop works on."""

    config: RunConfig
    world: World
    device: torch.device
    folder: RunFolder
    loader: Loader
    engine: Any
    average: Average | NoAverage
    checkpoints: Checkpoints
    state: TrainState
    evaluation: Evaluation | None = None
    skipped_images: int = 0  # on this rank, since it started

    @property
    def total_steps(self) -> int:
        return self.config.train.epochs * self.loader.steps_per_epoch


def train(run: Run) -> None:
    """Trains from `run.state` to the end, and saves there.

    Raises:
        Stopped: a signal came, and the step it came in is saved.
        Diverged: `train.max_nonfinite` steps in a row did not move the weights.
        ValueError: more images than `data.max_skipped` could not be decoded.
        OSError: the last checkpoint, at the end or on a signal, could not be written.
    """
    config, state, total = run.config, run.state, run.total_steps
    stop, meter, saved = StopRequest(), Meter(), state.step
    reporter = Reporter(run.folder, state.step, total, config.name) if run.world.is_main else NoReporter()
    with contextlib.closing(reporter):
        _evaluate(run, reporter, meter)  # what a kill or a signal kept from being measured
        for micro_batches, waited in _timed(run.loader.batches(state.step, total)):
            rate = _step(run, micro_batches, meter)
            meter.add_step(config.train.batch, waited, _note_skipped(run, micro_batches))
            _account(run, micro_batches, reporter)
            reporter.step()
            signal = stop.agreed()
            last = bool(signal) or state.step == total
            if last or state.step % config.log.every == 0:
                reporter.report(_values(run, meter, rate))
                meter.reset()
            if last or state.step % config.checkpoint.every == 0:
                saved = _save(run, saved, must=last, reporter=reporter)
            if signal and state.step < total:
                # slurm/_train.sh looks for these words
                raise Stopped(f"{signal}: saved and stopped after step {state.step} of {total}; run it again to go on")
            _evaluate(run, reporter, meter)


def _step(run: Run, micro_batches: list[Batch], meter: Meter) -> float:
    """One optimiser step; returns its learning rate."""
    config, engine = run.config, run.engine
    rate = learning_rate(
        run.state.updates, run.loader.steps_per_epoch, config.train.epochs, config.peak_lr, config.optim
    )
    set_learning_rate(engine.optimizer.param_groups, rate)
    for part, batch in enumerate(micro_batches):
        seed_step(config.seed, run.state.step, part, run.world.rank)
        images = batch.images.to(run.device, non_blocking=True)
        view = {name: index.to(run.device, non_blocking=True) for name, index in batch.view.items()}
        losses = engine(images, view, **run.average.targets(images))
        meter.add_losses(losses)
        engine.backward(poison_nonfinite(losses["loss"]))
        engine.step()
    return rate


def seed_step(*where: int) -> None:
    """What a module draws by itself (drop path, mixup) depends on where it is alone: nothing of it need be saved."""
    (word,) = np.random.SeedSequence(where).generate_state(1)
    torch.manual_seed(int(word))
    np.random.seed(word)
    random.seed(int(word))


def _note_skipped(run: Run, micro_batches: list[Batch]) -> int:
    """Lists the images that could not be decoded and were replaced; returns how many, or raises as `train` does."""
    skipped = [reason for batch in micro_batches for reason in batch.skipped]
    if skipped:
        with run.folder.skipped_images.open("a") as file:
            file.writelines(f"{reason}\n" for reason in skipped)
    run.skipped_images += len(skipped)
    if run.skipped_images > run.config.data.max_skipped:
        raise ValueError(
            f"{run.skipped_images} images could not be decoded, more than data.max_skipped="
            f"{run.config.data.max_skipped}; they are listed in {run.folder.skipped_images}"
        )
    return len(skipped)


def _account(run: Run, micro_batches: list[Batch], reporter: Reporter | NoReporter) -> None:
    """Counts the step and, where the optimiser refused it, names its samples."""
    state, train = run.state, run.config.train
    state.step += 1
    state.samples += train.batch
    if run.engine.was_step_applied():
        state.updates += 1
        state.nonfinite_in_row = 0
        run.average.follow(state.updates / run.total_steps)
        return
    state.nonfinite_in_row += 1
    keys = [key for batch in micro_batches for key in batch.keys]
    log_nonfinite(run.folder.nonfinite, state.step, keys, run.world)
    in_row = state.nonfinite_in_row
    reporter.say(f"step {state.step}: the gradient is not finite; the weights did not move ({in_row} in a row)")
    if in_row >= train.max_nonfinite:
        raise Diverged(
            f"{in_row} steps in a row had no finite gradient (train.max_nonfinite); their samples are "
            f"in {run.folder.nonfinite}: look at those images, lower optim.base_lr, or set train.precision=fp32"
        )


def _values(run: Run, meter: Meter, rate: float) -> dict[str, Any]:
    state = run.state
    return {
        "step": state.step,
        "epoch": state.step / run.loader.steps_per_epoch,
        **meter.read(),
        "lr": rate,
        "grad_norm": float(run.engine.get_global_grad_norm()),
        "refused_steps": state.step - state.updates,
    }


def _evaluate(run: Run, reporter: Reporter | NoReporter, meter: Meter) -> None:
    """Measures this step if it is due and has not been measured yet; the training's speed is not that of measuring."""
    state, evaluation = run.state, run.evaluation
    if evaluation is None or state.step == 0 or (state.step % evaluation.every and state.step < run.total_steps):
        return
    measured = [state.step in (row["step"] for row in read_metrics(run.folder.evaluation))]
    torch.distributed.broadcast_object_list(measured)  # the main rank's file counts
    if not measured[0]:
        place = {"step": state.step, "epoch": state.step / run.loader.steps_per_epoch}
        start = time.perf_counter()
        reporter.evaluated(place | evaluation.measure())
        meter.leave_out(time.perf_counter() - start)


def _save(run: Run, saved: int, must: bool, reporter: Reporter | NoReporter) -> int:
    """Saves unless this step is already saved; returns the newest saved step.

    A periodic save that the disk refuses is said and tried again at the next: going on loses nothing that stopping
    would keep.
    """
    if saved == run.state.step:
        return saved
    problem = run.checkpoints.save(run.engine, run.average, run.state)
    if problem is None:
        return run.state.step
    if must:
        raise OSError(f"{problem}; make room and start the same command: it continues from step {saved}")
    reporter.say(f"{problem}; training goes on and tries again in {run.config.checkpoint.every} steps")
    return saved


def _timed(batches: Iterator[T]) -> Iterator[tuple[T, float]]:
    """Each item with the seconds that were spent waiting for it."""
    while True:
        start = time.perf_counter()
        try:
            item = next(batches)
        except StopIteration:
            return
        yield item, time.perf_counter() - start
