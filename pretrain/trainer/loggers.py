"""Where a run's metrics go: JSON lines, TensorBoard and a progress bar, behind one interface."""

import json
import logging
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pretrain.trainer.append import append
from pretrain.trainer.config import RunConfig
from pretrain.trainer.durable import write_durably
from pretrain.trainer.metrics import read_metrics
from pretrain.trainer.run_folder import RunFolder

_SILENCE = 60.0  # seconds after which a run without a terminal reports its progress
_log = logging.getLogger(__name__)
Values = dict[str, Any]  # by name, including `step` and `epoch`


class MetricLogger(ABC):
    """A destination for a run's metrics, on the main rank only. `build_loggers` builds those of a run."""

    @abstractmethod
    def log_metrics(self, values: Values) -> None:
        """Logs training metrics since the last call. Some may not be finite."""

    @abstractmethod
    def log_evaluation(self, values: Values) -> None:
        """Logs the results of an evaluation between two steps: numbers, and perhaps words about them."""

    def step(self) -> None:  # noqa: B027 - most loggers do nothing here
        """Called after every optimizer step."""

    def close(self) -> None:  # noqa: B027
        """Called at the end of training, however it ends."""


class Loggers(MetricLogger):
    """Passes everything to several loggers; to none on ranks that log nothing.

    A logger that cannot write, because a disk is full or the reader of our output has ended, is reported once and does
    not end the training.
    """

    def __init__(self, loggers: Sequence[MetricLogger] = ()):
        self.loggers = loggers
        self._failed: set[MetricLogger] = set()

    def log_metrics(self, values: Values) -> None:
        self._each(lambda logger: logger.log_metrics(values))

    def log_evaluation(self, values: Values) -> None:
        self._each(lambda logger: logger.log_evaluation(values))

    def step(self) -> None:
        self._each(lambda logger: logger.step())

    def close(self) -> None:
        self._each(lambda logger: logger.close())

    def _each(self, call: Callable[[MetricLogger], None]) -> None:
        for logger in self.loggers:
            try:
                call(logger)
            except OSError as error:
                if logger not in self._failed:
                    name = type(logger).__name__
                    _log.warning("%s cannot write: %s; training continues, but entries will be missing", name, error)
                self._failed.add(logger)


def build_loggers(config: RunConfig, folder: RunFolder, start: int, total: int, is_main: bool) -> Loggers:
    """The loggers of a run from step `start` to step `total`; none unless `is_main`."""
    if not is_main:
        return Loggers()
    return Loggers([JsonLines(folder, start), TensorBoard(folder, start), ProgressBar(config.name, start, total)])


class JsonLines(MetricLogger):
    """metrics.jsonl and evaluation.jsonl, one JSON object per line. JSON has no NaN: non-finite values are null."""

    def __init__(self, folder: RunFolder, start: int):
        self.metrics, self.evaluation = folder.metrics, folder.evaluation
        for path in (self.metrics, self.evaluation, folder.nonfinite):
            drop_after(path, start)

    def log_metrics(self, values: Values) -> None:
        _append(self.metrics, values)

    def log_evaluation(self, values: Values) -> None:
        _append(self.evaluation, values)


class TensorBoard(MetricLogger):
    """Event files, without text and non-finite values."""

    def __init__(self, folder: RunFolder, start: int):
        self.writer = SummaryWriter(str(folder.tensorboard), purge_step=start + 1)

    def log_metrics(self, values: Values) -> None:
        for key, value in values.items():
            if key != "step" and not isinstance(value, str) and math.isfinite(value):
                self.writer.add_scalar(key, value, values["step"])

    log_evaluation = log_metrics

    def close(self) -> None:
        self.writer.close()


class ProgressBar(MetricLogger):
    """A progress bar on a terminal; elsewhere one line per logged step, and more lines if those are far apart."""

    def __init__(self, name: str, start: int, total: int):
        self.start, self.done, self.total = start, start, total
        self.began = self.said = time.monotonic()
        self.bar = tqdm(
            total=total, initial=start, desc=name, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )

    def step(self) -> None:
        self.bar.update()
        now, self.done = time.monotonic(), self.done + 1
        if not self.bar.disable or self.done == self.total:
            return
        if self.done == self.start + 1:
            self.first = now
            self._say(f"the first step took {now - self.began:.1f} s")
        elif self.done == self.start + 3 or now - self.said > _SILENCE:  # the first step is not typical
            seconds = (now - self.first) / (self.done - self.start - 1)
            left = tqdm.format_interval((self.total - self.done) * seconds)
            self._say(f"{seconds:.2f} s a step, about {left} left")

    def log_metrics(self, values: Values) -> None:
        size = f"{values['image_size']} px  " if "image_size" in values else ""
        line = (
            f"{size}loss {values['loss']:.4f}  lr {values['lr']:.2e}  {values['images_per_s']:.1f} img/s  "
            f"wait {values['data_wait']:.0%}"
        )
        self.bar.set_postfix_str(line)
        if self.bar.disable:
            left = (self.total - values["step"]) * values["step_s"]
            pace = " at this pace" if size else ""
            self._say(f"{line}  {tqdm.format_interval(left)} left{pace}")

    def _say(self, text: str) -> None:
        self.said = time.monotonic()
        print(f"step {self.done}/{self.total}  {text}", flush=True)

    def log_evaluation(self, values: Values) -> None:
        shown = {key: value for key, value in values.items() if key not in ("step", "epoch")}
        words = "  ".join(
            f"{key} {value if isinstance(value, str) else f'{value:.4g}'}" for key, value in shown.items()
        )
        self.bar.write(f"step {values['step']}: {words}", file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


def _append(path: Path, values: Values) -> None:
    finite = {key: v if isinstance(v, int | str) or math.isfinite(v) else None for key, v in values.items()}
    append(path, json.dumps(finite) + "\n")


def drop_after(path: Path, step: int) -> None:
    """Deletes the records after a step: a resumed run repeats the steps after its checkpoint."""
    if not path.exists():
        return
    records = [record for record in read_metrics(path) if record["step"] <= step]
    write_durably(path, "".join(json.dumps(record) + "\n" for record in records))
