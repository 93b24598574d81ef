"""Ranks that meet, are missing, or find another program at their port."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from pretrain.trainer import meeting, signals
from pretrain.trainer.meeting import free_port
from pretrain.trainer.signals import Stopped

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """The port of a run with two ranks and short timeouts."""
    port = free_port()
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(meeting, "_FOREIGN", 0.5)
    monkeypatch.setattr(meeting, "_POLL", 0.01)
    return port


@pytest.fixture
def silent_listener(port: int) -> Iterator[None]:
    """Another program listens on the port and does not answer."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", port))
        listening.listen()
        yield


def test_two_ranks_meet_at_one_store() -> None:
    hosted = meeting._host_store()
    found = meeting._find_store()
    waiting = threading.Thread(target=meeting._introduce, args=(found, 1))
    waiting.start()  # before the main rank has published which run it is
    meeting._introduce(hosted, 0)
    waiting.join(10)
    both = [dist.PrefixStore(meeting._token(), store) for store in (hosted, found)]
    other = threading.Thread(target=meeting._wait_for_all, args=(both[1], 1, 2))
    other.start()
    meeting._wait_for_all(both[0], 0, 2)
    other.join(10)
    assert not other.is_alive()


@pytest.mark.usefixtures("silent_listener")
def test_port_in_use_is_reported_on_all_ranks(port: int) -> None:
    with pytest.raises(ValueError, match=f"port {port} is already in use by process {os.getpid()}"):
        meeting._host_store()
    with pytest.raises(
        ValueError, match=f"port {port} of 127.0.0.1 is used by another program or run, not by this run's main rank"
    ):
        meeting._find_store()


def test_store_of_another_run_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    store = meeting._host_store()
    meeting._introduce(store, 0)
    with pytest.raises(ValueError, match="another program or run"):
        meeting._introduce(store, 0)  # a second start of the same command
    monkeypatch.setattr(sys, "argv", ["run.py", "another_recipe"])
    with pytest.raises(ValueError, match="another program or run"):
        meeting._introduce(store, 1)


def test_missing_ranks_are_named_and_a_signal_ends_the_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, asked = dist.HashStore(), iter([[], [], [], [int(signal.SIGTERM)]])
    store.set("here/0", "1")
    monkeypatch.setattr(meeting, "SLOW", 0.0)

    class Received:
        def __bool__(self) -> bool:
            return bool(next(asked))

    monkeypatch.setattr(signals, "_received", Received())
    with caplog.at_level(logging.WARNING), pytest.raises(Stopped, match="while waiting for ranks 1, 2 to start"):
        meeting._wait_for_all(store, 0, 3)
    assert "ranks 1, 2 have not started: check the logs of their nodes" in caplog.text


ORPHAN = """
import sys, time
from pretrain.trainer.config import WatchdogConfig
from pretrain.trainer.launch import World
from pretrain.trainer.signals import told_to_stop, watch_signals
from pretrain.trainer.watchdog import Watchdog

watch_signals()
with Watchdog(WatchdogConfig(), World(0, 1, 0)):
    print("trains", flush=True)
    while not told_to_stop():
        time.sleep(0.05)
print("stops", flush=True)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


def test_rank_stops_when_its_launcher_is_killed(tmp_path: Path) -> None:
    launcher = tmp_path / "torchrun"
    launcher.write_text(LAUNCHER)
    command = [sys.executable, str(launcher), ORPHAN]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "trains\n"
        process.kill()
        assert process.stdout.read() == "stops\n"
