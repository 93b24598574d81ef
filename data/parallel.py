"""Shared by the command lines of this package: worker processes with a progress bar, and one-line errors."""

import io
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

from data.storage.location import without_secrets

Item = TypeVar("Item")
Result = TypeVar("Result")


def print_any_name() -> None:
    """Makes stdout and stderr print escapes for characters that their encoding lacks, which file names may have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_error(error: Exception) -> None:
    """Prints an error on stderr, without passwords and tokens, whichever library's message repeats them."""
    print(without_secrets(f"error: {error}"), file=sys.stderr)


def report_errors(command: Callable[[], int]) -> int:
    """Runs a command and returns its exit code; errors that a user can fix become one line on stderr and code 1."""
    print_any_name()
    try:
        return command()
    except BrokenProcessPool:
        print("error: a worker process was killed, perhaps out of memory: lower --num-workers", file=sys.stderr)
    except (ValueError, OSError) as error:
        print_error(error)
    return 1


def run_parallel(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, description: str, unit: str
) -> Iterator[Result]:
    """Yields ``function(item)`` for every item, in any order, and raises its errors; one worker is this process."""
    workers = min(workers, len(items))
    with tqdm(desc=description, total=len(items), unit=unit, disable=None) as bar:
        if workers <= 1:
            for item in items:
                yield function(item)
                bar.update()
            return
        # "spawn": forked children would inherit the locks of this process and keep them after it was killed.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, _end_with_parent, (os.getpid(),)) as pool:
            try:
                for future in as_completed([pool.submit(function, item) for item in items]):
                    yield future.result()
                    bar.update()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def _end_with_parent(parent: int) -> None:
    """Ends a pool worker when its parent is killed; it would wait forever otherwise."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
