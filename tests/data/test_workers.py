"""Worker processes that cannot hand over a batch, die, or get no data."""

import logging
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers.waiting import SECONDS

import data.handover
import data.workers
from data.handover import HandoverPacker
from data.index import Index
from data.loader import Loader
from data.waiting import while_waiting
from data.workers import in_workers


def batches(index: Index, num_workers: int) -> list[torch.Tensor]:
    steps = Loader(index, size=(16, 24), batch=24, seed=5, num_workers=num_workers).batches(0, 3)
    return [batch.images for step in steps for batch in step]


def assert_as_without_workers(index: Index, num_workers: int = 2) -> None:
    for ours, plain in zip(batches(index, num_workers), batches(index, 0), strict=True):
        assert torch.equal(ours, plain)
        ours += 1  # the memory is writable


@pytest.fixture
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor goes through shared memory."""
    monkeypatch.setattr(data.handover, "SMALL", -1)


@pytest.fixture
def full_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Imitates the error of torch and the file that it leaves behind."""

    def no_room(*_: object) -> None:
        (tmp_path / f"torch_{os.getpid()}_123_0").touch()
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
        )

    monkeypatch.setattr(data.handover, "_SharingPickler", no_room)
    monkeypatch.setattr(data.handover, "SHARED_MEMORY", tmp_path)
    return tmp_path


def test_batches_go_through_pipes_if_shared_memory_is_full(
    index: Index, full_shared_memory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert_as_without_workers(index)
    assert not list(full_shared_memory.glob("torch_*")), "what torch left behind is removed"
    (warning,) = [record.message for record in caplog.records]
    assert "No space left on device (28)" in warning
    assert f"{full_shared_memory} has" in warning
    assert "--shm-size" in warning
    assert "lower data.num_workers (2)" in warning


def test_shared_memory_is_used_if_it_has_room(index: Index, caplog: pytest.LogCaptureFixture) -> None:
    packed = HandoverPacker()({"images": torch.zeros(1 << 20), "masks": torch.arange(100)})
    assert len(packed.pickled) < 10000
    assert torch.equal(packed.result["images"], torch.zeros(1 << 20))
    assert torch.equal(packed.result["masks"], torch.arange(100))
    packed.result["masks"][0] = 1  # the memory is writable
    assert_as_without_workers(index)
    assert not caplog.records


@pytest.mark.usefixtures("nothing_is_small")
def test_shared_memory_works_with_a_long_tmpdir(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The path of a Unix socket has at most 107 bytes."""
    settings: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {**settings, "tempdir": None})
    folder = tmp_path / ("scratch" * 15)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    assert_as_without_workers(index)
    assert not caplog.records, "shared memory, not pipes"
    assert not list(folder.iterdir())


@pytest.mark.usefixtures("nothing_is_small")
def test_batches_go_through_pipes_if_socket_paths_are_too_long(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / ("scratch" * 15)
    folder.mkdir()
    settings: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {**settings, "tempdir": str(folder)})
    with caplog.at_level(logging.WARNING):
        assert_as_without_workers(index)
    assert [record.message.count("AF_UNIX path too long") for record in caplog.records] == [1]


def test_workers_that_cannot_start_are_a_clear_error(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_semaphores(loader: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(data.workers.DataLoader, "__iter__", no_semaphores)
    with pytest.raises(OSError, match=r"cannot be started .*Read-only.*/dev/shm.*data\.num_workers=0"):
        batches(index, 2)


THIRD_FORK_FAILS = """
import errno, os, signal, time
from pathlib import Path
import data.workers
from data.parallel import report_errors
def make(request):
    return request
def ignores_sigterm(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("SigIgn:")[1].split()[0], 16) >> (signal.SIGTERM - 1) & 1
fork, children = os.fork, []
def failing_fork():
    if len(children) == 2:
        while not all(map(ignores_sigterm, children)):  # from then on, Python's way of ending children has no effect
            time.sleep(0.02)
        raise OSError(errno.ERRNO, os.strerror(errno.ERRNO))
    children.append(fork())
    return children[-1]
os.fork = failing_fork
raise SystemExit(report_errors(lambda: list(data.workers.in_workers(make, iter(range(9)), 4)) and 0))
"""


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (
            "EAGAIN",
            r"cannot be started .*temporarily unavailable.*lower data\.num_workers, or raise `ulimit -u`",
        ),
        ("EMFILE", "cannot be started: too many open files: .*`ulimit -n 65536`"),
    ],
)
def test_process_ends_if_only_some_workers_can_start(number: str, says: str) -> None:
    """Workers that did start ignore the SIGTERM with which Python ends children before it waits for them."""
    command = [sys.executable, "-c", THIRD_FORK_FAILS.replace("ERRNO", number)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert re.search(says, done.stderr), done.stderr
    assert "/dev/shm" not in done.stderr


def many_arrays(request: int) -> list[torch.Tensor]:
    return [torch.zeros(1) for _ in range(100)]


@pytest.mark.usefixtures("nothing_is_small")
def test_too_many_open_files_are_a_clear_error() -> None:
    """The kernel drops shared memory descriptors from a message if the process has no room for them."""
    open_now, limits = len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)
    made = in_workers(many_arrays, iter(range(9)), 2)
    try:
        kept = [next(made)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 150, limits[1]))
        with pytest.raises(OSError, match=r"too many open files: .*may have \d+, .*`ulimit -n 65536`"):
            kept.extend(made)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def sleep(request: int) -> None:
    time.sleep(1000)


def fail(request: int) -> None:
    raise OSError(5, "Input/output error", "/storage/a.tar")


RANK = """
import os, signal
from data.workers import in_workers
def make(request):
    return os.getpid()
batches = in_workers(make, iter(range(100)), 1)
print(next(batches), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_die_with_their_process() -> None:
    """At once, because they would keep its connections to other ranks open."""
    command = [sys.executable, "-c", RANK]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, timeout=SECONDS)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while psutil.pid_exists(worker := int(done.stdout)) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_unresponsive_storage_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.workers, "WORKER_TIMEOUT", 0.0)
    with pytest.raises(
        TimeoutError, match=r"no batch for 0 seconds from 2 data workers.* reading /storage: "
    ) as caught:
        list(in_workers(sleep, iter(range(9)), 2, "/storage"))
    assert "DataLoader" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_file_system_error_is_one_line(workers: int) -> None:
    with pytest.raises(OSError, match=r"Input/output error: '/storage/a\.tar'") as caught:
        list(in_workers(fail, iter(range(9)), workers))
    assert "\n" not in str(caught.value)


def test_callback_while_waiting_can_end_the_wait() -> None:
    class EndedError(Exception):
        pass

    def end() -> None:
        raise EndedError

    start = time.monotonic()
    with pytest.raises(EndedError), while_waiting(end):
        list(in_workers(sleep, iter(range(9)), 2))
    assert time.monotonic() - start < 8, "hanging workers are killed"
    assert not multiprocessing.active_children()
