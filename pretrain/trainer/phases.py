"""Reports what a run is doing while something takes long: indexing, joining the other ranks, compiling."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

from tqdm import tqdm

UNLIMITED = timedelta(days=1)  # timeout of collectives whose phase has a limit: the watchdog says what took so long
SLOW = 10.0  # seconds after which a phase is reported; then after twice as many more, and so on
_log = logging.getLogger(__name__)


class Phase(NamedTuple):
    """What this process is doing, which key of `watchdog` limits it, and since when by `time.monotonic`."""

    name: str
    limit: str
    start: float


_running: list[Phase] = []


def current_phase() -> Phase | None:
    """The innermost phase that this process is in; called by the watchdog's thread."""
    running = list(_running)
    return running[-1] if running else None


@contextlib.contextmanager
def limited(name: str, limit: str) -> Iterator[None]:
    """Within this context the process does what `name` says, for at most `watchdog.<limit>` minutes."""
    phase = Phase(name, limit, time.monotonic())
    _running.append(phase)
    try:
        yield
    finally:
        _running.remove(phase)


@contextlib.contextmanager
def report_if_slow(phase: str, limit: str = "start_minutes") -> Iterator[None]:
    """Logs every now and then that `phase` is still going on, nothing if it is quick; limits it like `limited`."""
    start, ended = time.monotonic(), threading.Event()

    def report() -> None:
        wait = SLOW
        while not ended.wait(wait):
            _log.info("%s: %s so far", phase, tqdm.format_interval(time.monotonic() - start))
            wait *= 2

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        with limited(phase, limit):
            yield
    finally:
        ended.set()
        thread.join()
