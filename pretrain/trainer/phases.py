"""Says what a run is doing while something takes long: indexing, joining the other ranks, compiling."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from tqdm import tqdm

SLOW = 10.0  # seconds after which a phase is mentioned; then after twice as many more, and so on
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def report_if_slow(phase: str) -> Iterator[None]:
    """Logs every now and then that `phase` still goes on; nothing if it is quick."""
    start, ended = time.monotonic(), threading.Event()

    def report() -> None:
        wait = SLOW
        while not ended.wait(wait):
            _log.info("%s: %s so far", phase, tqdm.format_interval(time.monotonic() - start))
            wait *= 2

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
