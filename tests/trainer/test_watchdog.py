"""The watchdog: a rank that hangs exits and reports where, including the file that it is reading."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from helpers.ending import Ended
from helpers.waiting import SECONDS

from pretrain.trainer import watchdog
from pretrain.trainer.config import WatchdogConfig
from pretrain.trainer.launch import World
from pretrain.trainer.main import _exit_code
from pretrain.trainer.phases import current_phase, limited, report_if_slow
from pretrain.trainer.watchdog import HUNG, Watchdog, files_being_read

ROOT = Path(__file__).parents[2]
HANGS = """
import time
from pretrain.trainer.config import WatchdogConfig
from pretrain.trainer.launch import World
from pretrain.trainer.phases import limited
from pretrain.trainer.watchdog import Watchdog

def wait_for_ever():
    open("{pipe}").read()

with Watchdog(WatchdogConfig(step_minutes=0.01), World(0, 1, 0)), limited("step 7", "step_minutes"):
    wait_for_ever()
"""

DISK_HANGS = """
import logging, sys, threading, time
from pathlib import Path
from pretrain.trainer import watchdog
from pretrain.trainer.config import WatchdogConfig
from pretrain.trainer.launch import World
from pretrain.trainer.logs import _RankFileHandler
from pretrain.trainer.phases import limited

class Hanging(_RankFileHandler):
    def emit(self, record):
        time.sleep(1000)

watchdog._LAST_WORDS = 20.0
logging.basicConfig(level=logging.INFO)  # the console, which does not hang
logging.getLogger().addHandler(Hanging(Path("unused")))
with watchdog.Watchdog(WatchdogConfig(checkpoint_minutes=0.01), World(0, 1, 0)):
    with limited("saving step 500", "checkpoint_minutes"):
        {main_thread}
"""


def test_current_phase_is_the_innermost_and_ends_with_its_context():
    assert current_phase() is None
    with report_if_slow("loading"), limited("step 1", "step_minutes"):
        assert current_phase()[:2] == ("step 1", "step_minutes")
    with pytest.raises(KeyError), limited("step 2", "step_minutes"):
        raise KeyError
    assert current_phase() is None


def test_hung_process_exits_and_reports_what_it_was_doing(tmp_path: Path):
    pipe = tmp_path / "stalled.tar"
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)  # otherwise the reader would block in open, not in read
    command = [sys.executable, "-c", HANGS.format(pipe=pipe)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LOMAR_ATTEMPT": str(tmp_path / "attempt0")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    os.close(writer)
    assert done.returncode == HUNG
    assert "step 7 has taken longer than watchdog.step_minutes=0.01 minutes" in done.stderr
    assert "in wait_for_ever" in done.stderr
    assert f"is reading {pipe}" in done.stderr
    assert (tmp_path / "attempt0-hung").exists()


@pytest.mark.parametrize("main_thread", ["time.sleep(1000)", "logging.getLogger().info('saves')"])
def test_process_hung_at_the_disk_of_its_log_still_marks_the_attempt_and_asks_for_a_requeue(
    main_thread: str, tmp_path: Path
):
    command = [sys.executable, "-c", DISK_HANGS.format(main_thread=main_thread)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LOMAR_ATTEMPT": str(tmp_path / "attempt0")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == HUNG
    assert (tmp_path / "attempt0-hung").exists()
    assert "is at: saving step 500" in done.stderr, "the console still gets the later messages"


def test_hung_process_ends_even_if_it_cannot_mark_the_attempt(
    watch: Callable[..., Watchdog], monkeypatch: pytest.MonkeyPatch
):
    freed, start = threading.Event(), time.monotonic()
    monkeypatch.setattr(watchdog, "mark_attempt", lambda how: freed.wait(60))
    with pytest.raises(Ended, match=str(HUNG)):
        watch(1)._end("step 7 hangs", HUNG)
    assert time.monotonic() - start < 30
    freed.set()


def test_hung_process_without_temporary_files_is_marked_too(
    watch: Callable[..., Watchdog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse(mode: str) -> None:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setenv("LOMAR_ATTEMPT", str(tmp_path / "attempt0"))
    monkeypatch.setattr(watchdog.tempfile, "TemporaryFile", refuse)
    with pytest.raises(Ended, match=str(HUNG)):
        watch(1)._end("step 7 hangs", HUNG)
    assert (tmp_path / "attempt0-hung").exists()
    assert "cannot tell where it is: no usable temporary directory" in caplog.text


def test_file_being_read_is_found_only_while_a_process_reads(tmp_path: Path):
    pipe = tmp_path / "stalled.tar"
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.DEVNULL)
    sleeper = subprocess.Popen(["sleep", "infinity"], stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + SECONDS
        while not (found := files_being_read(reader.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert found == [str(pipe)]
        assert files_being_read(sleeper.pid) == []
    finally:
        for process in (reader, sleeper):
            process.kill()
            process.wait()
        os.close(writer)


@pytest.fixture
def watch(ends_by_raising: None) -> Callable[..., Watchdog]:
    """watch(rank, step_minutes=...) -> one of three ranks' watchdogs, which share a store and start no threads."""
    store = dist.HashStore()

    def make(rank: int, **minutes: float) -> Watchdog:
        made = Watchdog(WatchdogConfig(**minutes), World(rank, 3, rank))
        made._store = store
        return made

    return make


def test_rank_exits_after_another_failed_and_reports_its_cause(
    watch: Callable[..., Watchdog], caplog: pytest.LogCaptureFixture
):
    failed, other = watch(1), watch(2)
    other._look_at_others()
    failed.tell("the disk is full")
    watch(2).tell("connection closed")  # a consequence: the first cause stays
    assert other.cause() == "the disk is full"
    with pytest.raises(Ended, match="1"):
        other._look_at_others()
    assert "error on rank 2: rank 1 has ended: the disk is full" in caplog.text
    failed._look_at_others()  # it exits by itself


def test_lost_rank_is_named_by_the_main_rank(watch: Callable[..., Watchdog]):
    main, other, lost = watch(0), watch(1), watch(2)
    for dog in (main, other, lost):
        dog._look_at_others()
    assert other.find_lost() == []
    assert main.find_lost() == [f"rank 2 on {os.uname().nodename}"]


def test_hung_rank_makes_all_ranks_exit(watch: Callable[..., Watchdog], caplog: pytest.LogCaptureFixture):
    hangs, other = watch(1, step_minutes=1e-6), watch(2)
    with limited("step 7", "step_minutes"):
        time.sleep(0.01)
        for rank, dog in ((1, hangs), (2, other)):
            with pytest.raises(Ended, match=str(HUNG)):
                (dog._check_limit if rank == 1 else dog._look_at_others)()
            assert f"error on rank {rank}: rank 1 on " in caplog.text
            assert f"rank {rank} on {os.uname().nodename} is at: step 7" in caplog.text


def test_main_rank_names_ranks_that_are_silent_when_a_limit_is_exceeded(
    watch: Callable[..., Watchdog], caplog: pytest.LogCaptureFixture
):
    main = watch(0, step_minutes=1e-6)
    main._heard = {1: (b"1 node1", time.monotonic() + 60), 2: (b"1 node2", 0.0)}
    with limited("step 7", "step_minutes"):
        time.sleep(0.01)
        with pytest.raises(Ended, match=str(HUNG)):
            main._check_limit()
    said = [record.getMessage() for record in caplog.records]
    assert "step 7 has taken longer" in said[0]
    assert said[1].startswith("no sign of life from rank 2 on node2 either")
    assert "is at: step 7" in said[2]


def test_limit_of_zero_is_no_limit(watch: Callable[..., Watchdog]):
    with limited("step 7", "step_minutes"):
        watch(1, step_minutes=0)._check_limit()


def test_main_rank_notices_a_silent_rank(watch: Callable[..., Watchdog], caplog: pytest.LogCaptureFixture):
    main, lively = watch(0, silent_minutes=1e-3), watch(1)
    for _ in range(3):
        main._check_silence(main._store)  # rank 2 never gives a sign of life, rank 1 does
        lively._store.set("alive/1", str(time.monotonic()))
    time.sleep(0.08)
    lively._store.set("alive/1", "again")
    with pytest.raises(Ended, match=str(HUNG)):
        main._check_silence(main._store)
    assert "nothing was heard from rank 2 for watchdog.silent_minutes=0.001 minutes" in caplog.text
    assert json.loads(main._store.get("ended"))["hung"]


def test_rank_exits_if_the_store_keeps_failing(watch: Callable[..., Watchdog], caplog: pytest.LogCaptureFixture):
    lost = watch(1)

    class Gone:
        def set(self, *arguments: object) -> None:
            raise RuntimeError("Connection reset by peer\nframes")

    lost._store = Gone()
    lost._look_at_others()  # a short failure is tolerated
    time.sleep(0.06)
    lost._polls = 0
    with pytest.raises(Ended, match="1"):
        lost._look_at_others()
    assert "rank 0, or the launcher, has ended or does not answer (Connection reset by peer)" in caplog.text


def test_rank_exits_if_the_store_hangs(watch: Callable[..., Watchdog], caplog: pytest.LogCaptureFixture):
    """Its process is stopped, so there is neither an answer nor an error."""
    lost, asked, ended = watch(1, silent_minutes=1e-3), threading.Event(), threading.Event()

    class Stopped:
        def set(self, *arguments: object) -> None:
            asked.set()
            ended.wait(60)
            raise RuntimeError("gone on again")

    lost._store, lost._is_orphan = Stopped(), True  # so that the listener's error does not end the rank
    lost._listener.start()
    assert asked.wait(10)
    time.sleep(0.1)
    with pytest.raises(Ended, match=str(HUNG)):
        lost._check_answer()
    lost._closed.set()
    ended.set()
    assert "rank 0, or the launcher, has not answered for watchdog.silent_minutes=0.001 minutes" in caplog.text


@pytest.mark.parametrize(
    ("problem", "is_bad"),
    [
        ("CUDA error: uncorrectable ECC error encountered", True),
        ("CUDA error: device-side assert triggered", False),
        ("CUDA out of memory. Tried to allocate 2 GiB", False),
    ],
)
def test_node_with_a_failed_gpu_is_marked_bad(
    problem: str, is_bad: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LOMAR_ATTEMPT", str(tmp_path / "attempt0"))
    monkeypatch.setenv("SLURMD_NODENAME", "node7")

    def train(config: object, world: World) -> None:
        raise RuntimeError(problem)

    assert _exit_code(train, SimpleNamespace(watchdog=WatchdogConfig()), World(0, 1, 0)) == 1
    assert [path.name for path in tmp_path.iterdir()] == (["attempt0-bad-node7"] if is_bad else [])
