"""Batches made by worker processes, in the order of the requests."""

import atexit
import ctypes
import errno
import faulthandler
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess, active_children
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.handover import SHARED_MEMORY, Handover, HandoverPacker, shorten_socket_folder, warn_of_pipes
from data.waiting import POLL, look_while_waiting

Request = TypeVar("Request")
Result = TypeVar("Result")

WORKER_TIMEOUT = 900.0  # seconds for one batch; only storage that has stopped responding takes that long
_TOO_MANY_FILES = ("oo many open files", "items of ancdata")  # a descriptor that finds no room is left out
IN_FLIGHT = 2  # requests per worker that are read ahead of the results
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_STACKS = signal.SIGUSR2  # makes a worker print its stacks
KILL_TIMEOUT = 5.0  # seconds to wait for a killed worker, which storage that hangs may hold forever


@dataclass(frozen=True)
class _Refusal:
    """A worker's error on its way to the main process, without the traceback that DataLoader would wrap it in."""

    error: ValueError | OSError

    def pin_memory(self) -> "_Refusal":
        return self


def in_workers(
    make: Callable[[Request], Result],
    requests: Iterator[Request],
    workers: int,
    source: object = "the data",
    fetching: Callable[[], bool] = lambda: False,
) -> Generator[Result, None, None]:
    """Yields ``make(request)`` for every request, one batch each; closing the iterator stops the workers.

    Args:
        make: picklable, if workers are not forked.
        requests: read in this process, some ahead of the results.
        workers: processes; 0 does everything in this one.
        source: what is read, for messages.
        fetching: called every second while waiting; true while this process fetches what the workers wait for, which
            has its own deadline. What it raises ends the wait.

    Raises:
        ValueError, OSError: what ``make`` raised, in a worker or here.
        ChildProcessError: a worker died.
        TimeoutError: no batch for `WORKER_TIMEOUT` seconds.
    """
    if not workers:
        for request in requests:
            result: Any = make(request)
            yield result.pin_memory() if torch.cuda.is_available() else result
        return
    shorten_socket_folder()
    made = _start(make, requests, workers)
    processes = list(made._workers)
    _RUNNING.update(processes)
    warned = False
    try:
        for item in _waited_for(made, processes, source, fetching):
            if isinstance(item, _Refusal):
                raise item.error
            if item.problem and not warned:
                warn_of_pipes(item.problem, item.size / 2**20, workers)
                warned = True
            yield item.result
    finally:
        made._shutdown_workers()  # now, and not when the last traceback that refers to the iterator is freed
        _kill(processes)


def _start(make: Callable[[Request], Result], requests: Iterator[Request], workers: int) -> Any:
    """Starts the workers; returns DataLoader's iterator."""
    before, others = signal.getsignal(signal.SIGCHLD), set(active_children())
    loader = DataLoader(
        _Results(make),
        sampler=_Requests(requests),
        batch_size=None,  # one request is one batch, made by one worker
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=IN_FLIGHT,
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
        timeout=POLL,
        generator=torch.Generator(),  # the default is the global generator, from which the model is initialized
    )
    try:
        return iter(loader)
    except BaseException as error:
        _kill(set(active_children()) - others - _RUNNING)  # those that did start are not in `_RUNNING` yet
        if isinstance(error, OSError):
            raise OSError(_why_not_started(error)) from error
        raise
    finally:
        if _in_main_thread():  # DataLoader's handler would raise wherever the main process is when a worker dies
            signal.signal(signal.SIGCHLD, before)


def _why_not_started(error: OSError) -> str:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"data workers cannot be started: {_too_many_files()}"
    why = f"data workers cannot be started ({error}): "
    if error.errno in (errno.EAGAIN, errno.ENOMEM):
        return (
            f"{why}there is no room for more processes, or no memory: lower data.num_workers, or raise `ulimit -u` or "
            f"the container's limit of processes (docker run --pids-limit)"
        )
    return (
        f"{why}they need semaphores in {SHARED_MEMORY}, so make it writable (docker run --shm-size=8g), or set "
        f"data.num_workers=0"
    )


def _waited_for(
    made: Any, processes: Sequence[BaseProcess], source: object, fetching: Callable[[], bool]
) -> Iterator[Any]:
    """Yields what DataLoader's iterator gives; dead workers and signals are noticed while it waits."""
    deadline = time.monotonic() + WORKER_TIMEOUT
    while True:
        try:
            with _dead_workers_raise(processes):
                item = next(made)
                if isinstance(item, Handover):
                    item.result  # noqa: B018 - the worker hands its shared memory over, so it must be alive
        except StopIteration:
            return
        except (RuntimeError, OSError) as error:
            if any(words in str(error) for words in _TOO_MANY_FILES):
                raise OSError(_too_many_files()) from error
            _raise_if_dead(processes, finished=True)
            if "DataLoader timed out" not in str(error):
                raise
            try:
                if fetching():
                    deadline = time.monotonic() + WORKER_TIMEOUT
                _look_while_waiting(deadline, len(processes), source)
            except BaseException:
                _kill(processes)  # DataLoader would wait 5 seconds for each of them
                raise
            continue
        yield item
        deadline = time.monotonic() + WORKER_TIMEOUT


def _too_many_files() -> str:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        f"too many open files: this process may have {limit}, and each array of a batch in shared memory is one: raise "
        f"the limit with `ulimit -n 65536`, or lower data.num_workers"
    )


def _look_while_waiting(deadline: float, workers: int, source: object) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(
            f"no batch for {WORKER_TIMEOUT:.0f} seconds from {workers} data workers, which are alive and reading "
            f"{source}: does this storage still respond?"
        )
    look_while_waiting()


@contextmanager
def _dead_workers_raise(processes: Sequence[BaseProcess]) -> Iterator[None]:
    """Raises if a worker dies: one that died mid-message would leave the main process reading the rest forever."""
    if not _in_main_thread():
        yield
        return

    def look(number: int, frame: FrameType | None) -> None:
        _raise_if_dead(processes)

    before = signal.signal(signal.SIGCHLD, look)
    try:
        _raise_if_dead(processes)
        yield
    except (EOFError, ConnectionError, FileNotFoundError):
        time.sleep(POLL)  # a worker that exits closes its socket first
        _raise_if_dead(processes)
        raise
    finally:
        signal.signal(signal.SIGCHLD, before)


def _raise_if_dead(processes: Sequence[BaseProcess], finished: bool = False) -> None:
    """Raises if a worker failed; with `finished` also if one ended normally, as all do after the last batch."""
    for process in processes:
        code = process.exitcode
        if code or (code == 0 and finished):
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            why = ", as the kernel does when memory runs out: lower data.num_workers" if code == -signal.SIGKILL else ""
            raise ChildProcessError(f"a data worker (process {process.pid}) {how}{why}")


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


class _Requests(Sampler[Request]):
    def __init__(self, requests: Iterator[Request]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[Request]:
        return self._requests


class _Results(Dataset[Handover | _Refusal], Generic[Request, Result]):
    """Lives in the workers."""

    def __init__(self, make: Callable[[Request], Result]) -> None:
        self._make, self._pack = make, HandoverPacker()

    def __getitem__(self, request: Request) -> Handover | _Refusal:
        try:
            result = self._make(request)
        except ValueError as error:
            return _Refusal(ValueError(str(error)))
        except OSError as error:
            return _Refusal(OSError(str(error)))
        return self._pack(result)


def _unchanged(item: Result) -> Result:
    return item


_RUNNING: set[BaseProcess] = set()


def _kill(workers: Iterable[BaseProcess]) -> None:
    """Kills workers that are still alive: they ignore the SIGTERM that DataLoader would send."""
    for worker in list(workers):
        worker.kill()
        worker.join(KILL_TIMEOUT)
        _RUNNING.discard(worker)


@atexit.register
def _kill_at_exit() -> None:
    """Kills workers left by an unfinished loop: Python waits for children at exit, so a dying rank would hang."""
    _kill(_RUNNING)


def ignore_signals(worker: int) -> None:
    """A `worker_init_fn` that makes workers leave signals to the main process.

    A scheduler sends them to the whole job, and the current step must complete.

    A worker still ends when the main process tells it to, and is killed if it does not, or if the main process dies.
    DataLoader has limited it to one thread.
    """
    _end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(_STACKS, file=2, all_threads=True)


def _end_with_parent() -> None:
    """Makes the kernel kill this worker when the thread that started it ends.

    By itself it would notice seconds later, if at all. Until then it would hold the inherited connections between the
    ranks, and the others would not see that its rank is gone.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def running_workers() -> list[int]:
    """The process IDs of the workers of this process that are alive."""
    return [worker.pid for worker in list(_RUNNING) if worker.pid is not None and worker.is_alive()]


def print_stacks_of_workers() -> None:
    """Makes the workers of this process print their stacks to stderr."""
    for pid in running_workers():
        with suppress(ProcessLookupError):
            os.kill(pid, _STACKS)
