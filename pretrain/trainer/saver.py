"""Decides when a training waits for its checkpoints, and reports how they went."""

import logging
import time
from typing import Any

from pretrain.trainer.attempt import mark_attempt
from pretrain.trainer.checkpoint import Checkpoints
from pretrain.trainer.checkpoint_layout import TrainState
from pretrain.trainer.checkpoint_writer import CheckpointWriter
from pretrain.trainer.ema import NoEMA
from pretrain.trainer.phases import limited

_log = logging.getLogger(__name__)


class Saver:
    """Saves a run at the same steps on all ranks, and keeps track of what is written.

    Args:
        is_main: whether this is the rank that tells the job script about each checkpoint.
        saved: the step that the run begins at, which needs no saving.
    """

    def __init__(self, checkpoints: Checkpoints, is_main: bool, saved: int):
        self._checkpoints, self._is_main = checkpoints, is_main
        self._begun = self._saved = saved  # steps: of the last save, and of the last one known to be written
        self._writer: CheckpointWriter | None = None
        self._since = time.perf_counter()  # when the last save began
        self._stall: dict[str, float] = {}

    def save(self, engine: Any, ema: NoEMA, state: TrainState, required: bool) -> None:
        """Begins a save unless this step is saved; waits for the previous one and, if `required`, for this one.

        A failed save is reported, and the next one is tried: stopping would save no more than continuing.

        Raises:
            OSError: a required one could not be written.
        """
        with limited(f"saving step {state.step}", "checkpoint_minutes"):
            start = time.perf_counter()
            if required or self._begun != state.step:
                self._wait()
            problem = None
            if (self._saved if required else self._begun) != state.step:
                self._begun = state.step
                self._writer = self._checkpoints.begin(engine, ema, state)
                if required:
                    problem = self._wait(then=None)
            stall = time.perf_counter() - start
        self._stall = {"checkpoint_stall_s": stall, "checkpoint_stall_share": stall / max(start - self._since, stall)}
        self._since = start
        if problem:
            raise OSError(f"{problem}; mend that and run the same command again: it continues from step {self._saved}")

    def poll(self) -> None:
        """Reports how the last save ended, if it has; called after each step, and waits for nothing."""
        if self._writer is not None and self._writer.done:
            self._wait()

    def metrics(self) -> dict[str, float]:
        """How long the last save stalled the training, and as a share of the time since the previous one; only once."""
        stall, self._stall = self._stall, {}
        return stall

    def close(self) -> None:
        """Waits for what is being written, however the training ends."""
        if self._writer is not None:
            with limited(f"writing the checkpoint of step {self._begun}", "checkpoint_minutes"):
                self._wait(then="the older ones are kept")

    def _wait(self, then: str | None = "training continues and will try the next checkpoint") -> str | None:
        """Waits for the save that is under way; returns its problem, which is logged with what comes `then`."""
        writer, self._writer = self._writer, None
        problem = writer.wait() if writer else None
        if problem and then:
            _log.warning("%s; %s", problem, then)
        if writer and problem is None:
            self._saved = self._begun
            self._mark()
        return problem

    def _mark(self) -> None:
        try:
            if self._is_main:
                mark_attempt("saved")
        except OSError as error:
            _log.warning("could not tell the job script about the checkpoint of step %d: %s", self._saved, error)
