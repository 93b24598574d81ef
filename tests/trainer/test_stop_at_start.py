"""A signal at the start, when ranks neither wait for each other at the same place nor end at the same time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from helpers.ending import Ended
from helpers.ports import free_port
from helpers.waiting import SECONDS

from pretrain.trainer import main as entry
from pretrain.trainer import signals
from pretrain.trainer.config import WatchdogConfig
from pretrain.trainer.launch import World
from pretrain.trainer.signals import Stopped
from pretrain.trainer.watchdog import HUNG, Watchdog

ROOT = Path(__file__).parents[2]
RANK = """
import logging, sys, time
from pathlib import Path
from types import SimpleNamespace
from pretrain.trainer import main
from pretrain.trainer.config import WatchdogConfig
from pretrain.trainer.launch import exit_process, find_world
from pretrain.trainer.preflight import checked_start
from pretrain.trainer.signals import told_to_stop, watch_signals

def train(config, world):
    def load():
        time.sleep(3)  # the watchdogs connect
        Path(f"loads{world.rank}").touch()
        while world.rank and not Path("rank0 has ended").exists():
            time.sleep(0.05)

    checked_start(world, Path("run"), "", load, lambda loaded: "")

logging.basicConfig(level=logging.INFO)
watch_signals()
exit_process(main._exit_code(train, SimpleNamespace(watchdog=WatchdogConfig()), find_world()))
"""
CONFIG = SimpleNamespace(watchdog=WatchdogConfig(silent_minutes=1e-3))


def wait_until_exists(*paths: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ranks_stop_without_an_error_if_one_still_reads_data_when_the_main_rank_has_ended(tmp_path: Path):
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "LOMAR_ATTEMPT": str(tmp_path / "attempt0"), "WORLD_SIZE": "2"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", RANK]
    ranks = []
    for rank in ("0", "1"):
        environment = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        ranks.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        wait_until_exists(tmp_path / "loads0", tmp_path / "loads1")
        for process in ranks:
            process.send_signal(signal.SIGUSR1)
        said = [ranks[0].communicate(timeout=SECONDS)[1]]
        (tmp_path / "rank0 has ended").touch()
        said.append(ranks[1].communicate(timeout=SECONDS)[1])
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [0, 0], said
    assert (tmp_path / "attempt0-stopped").exists()


@pytest.fixture
def store(ends_by_raising: None, monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    """The store of the watchdogs of a test, whose processes have received a signal."""
    shared = dist.HashStore()
    monkeypatch.setattr(signals, "_received", [signal.SIGUSR1])
    monkeypatch.setattr(Watchdog, "_join", lambda self: shared)
    return shared


def stop(config: object, world: World) -> None:
    time.sleep(0.1)  # it gives signs of life before
    raise Stopped("stopped by a signal")


def test_main_rank_that_is_still_busy_does_not_take_stopped_ranks_for_silent(
    store: dist.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LOMAR_ATTEMPT", str(tmp_path / "attempt0"))
    main = Watchdog(CONFIG.watchdog, World(0, 2, 0))
    store.set("alive/1", "1 node1")
    main._check_silence(store)
    assert entry._exit_code(stop, CONFIG, World(1, 2, 1)) == 0
    main._check_silence(store)
    time.sleep(0.1)
    main._check_silence(store)
    assert main._quiet() == []
    assert list(tmp_path.iterdir()) == []


def test_main_rank_that_no_signal_has_reached_does_not_wait_forever_for_a_stopped_rank(
    store: dist.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LOMAR_ATTEMPT", str(tmp_path / "attempt0"))
    monkeypatch.setattr(signals, "_received", [])
    main = Watchdog(CONFIG.watchdog, World(0, 2, 0))
    assert entry._exit_code(stop, CONFIG, World(1, 2, 1)) == 0
    main._check_silence(store)
    time.sleep(0.1)
    with pytest.raises(Ended, match=str(HUNG)):
        main._check_silence(store)
    assert [path.name for path in tmp_path.iterdir()] == ["attempt0-hung"], "the node is not bad"


@pytest.mark.parametrize(("rank", "code"), [(1, 0), (0, 1)])
def test_only_the_main_rank_takes_the_loss_of_the_store_for_an_error_after_a_signal(
    rank: int, code: int, store: dist.Store, monkeypatch: pytest.MonkeyPatch
):
    class Gone:
        def set(self, *arguments: object) -> None:
            raise RuntimeError("Broken pipe")

    monkeypatch.setattr(Watchdog, "_join", lambda self: Gone())
    dog = Watchdog(CONFIG.watchdog, World(rank, 2, rank))
    time.sleep(0.1)
    with pytest.raises(Ended, match=str(code)):
        dog._look_at_others()
