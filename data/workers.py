"""Batches made by worker processes, in the order of the requests."""

import atexit
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

Request = TypeVar("Request")
Result = TypeVar("Result")

WORKER_TIMEOUT = 900.0  # seconds for one batch; only storage that has stopped responding takes that long


@dataclass(frozen=True)
class _Refusal:
    """A worker's ValueError on its way to the main process, without the traceback that DataLoader would wrap it in."""

    message: str


def in_workers(
    make: Callable[[Request], Result], requests: Iterator[Request], workers: int
) -> Generator[Result, None, None]:
    """``make(request)`` for every request, one batch each. Closing the iterator stops the workers.

    Args:
        make: picklable, if workers are not forked.
        requests: read in this process, some ahead of the results.
        workers: processes; 0 does everything in this one.

    Raises:
        ValueError: what ``make`` raised, in a worker or here.
        RuntimeError: a worker died or its storage stopped responding.
    """
    loader = DataLoader(
        _Results(make),
        sampler=_Requests(requests),
        batch_size=None,  # one request is one batch, made by one worker
        collate_fn=_unchanged,
        num_workers=workers,
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
        timeout=WORKER_TIMEOUT if workers else 0,
        generator=torch.Generator(),  # the default is the global generator, from which the model is initialized
    )
    made: Any = iter(loader)
    processes = list(made._workers) if workers else []
    _RUNNING.update(processes)
    try:
        for item in made:
            if isinstance(item, _Refusal):
                raise ValueError(item.message)
            yield item
    finally:
        if processes:
            made._shutdown_workers()  # now, and not when the last traceback that refers to the iterator is freed
        _kill(processes)


class _Requests(Sampler[Request]):
    def __init__(self, requests: Iterator[Request]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[Request]:
        return self._requests


class _Results(Dataset[Result | _Refusal], Generic[Request, Result]):
    """Lives in the workers."""

    def __init__(self, make: Callable[[Request], Result]) -> None:
        self._make = make

    def __getitem__(self, request: Request) -> Result | _Refusal:
        try:
            return self._make(request)
        except ValueError as error:
            return _Refusal(str(error))


def _unchanged(item: Result) -> Result:
    return item


_RUNNING: set[BaseProcess] = set()


def _kill(workers: Iterable[BaseProcess]) -> None:
    """Kills workers that are still alive: they ignore the SIGTERM that DataLoader would send."""
    for worker in list(workers):
        worker.kill()
        worker.join()
        _RUNNING.discard(worker)


@atexit.register
def _kill_at_exit() -> None:
    """Python waits at exit for every child: one left by an unfinished loop would block a dying rank forever."""
    if _RUNNING:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would report the kill as an error
        _kill(_RUNNING)


def ignore_signals(worker: int) -> None:
    """A `worker_init_fn` by which workers leave signals to the main process.

    A scheduler sends them to the whole job, and the current step must complete.

    A worker still ends when the main process tells it to or has died, and is killed if it does not. DataLoader has
    limited it to one thread.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
