"""Ranks and data workers that are stopped, killed or fail: all ranks exit soon and report why."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.rank_checks import wait_for
from helpers.waiting import SECONDS

from pretrain.trainer.attempt import node_name
from pretrain.trainer.watchdog import HUNG, POLL

pytestmark = pytest.mark.engine
LONG = ("train.epochs=100", "train.ds_config=zero1", "checkpoint.every_steps=2", "checkpoint.keep_last=1")


def train(start: Callable[..., Any], recipe: Path, tmp_path: Path, *overrides: str) -> Any:
    """Starts a run, and returns once it has saved a checkpoint."""
    run = start(recipe, *LONG, *overrides)
    wait_for(tmp_path / "runs" / "tiny" / "checkpoints" / "latest", run)
    return run


def test_stopped_rank_is_named(start: Callable[..., Any], recipe: Path, tmp_path: Path):
    run = train(start, recipe, tmp_path, "watchdog.silent_minutes=0.25")
    main, stopped = run.all
    stopped.send_signal(signal.SIGSTOP)
    assert main.ended(time.monotonic() + SECONDS)
    assert main.returncode == HUNG
    assert f"nothing was heard from rank 1 on {node_name()} for watchdog.silent_minutes=0.25 minutes" in main.said()
    assert "rank 0 on " in main.said()
    assert " is at: " in main.said()


def test_stopped_data_worker_is_named(start: Callable[..., Any], recipe: Path, tmp_path: Path):
    run = train(start, recipe, tmp_path, "watchdog.step_minutes=0.25")
    (worker,) = psutil.Process(run.all[1].pid).children()
    os.kill(worker.pid, signal.SIGSTOP)
    main, other = run.outputs()
    assert [rank.returncode for rank in run.all] == [HUNG, HUNG]
    assert "has taken longer than watchdog.step_minutes=0.25 minutes" in main
    assert f"process {worker.pid} (stopped): it was stopped (SIGSTOP)" in other
    assert psutil.wait_procs([worker], SECONDS)[1] == []


def test_killed_rank_is_named(start: Callable[..., Any], recipe: Path, tmp_path: Path):
    run = train(start, recipe, tmp_path)
    time.sleep(3 * POLL)  # it has given a sign of life, with its node
    main, killed = run.all
    killed.send_signal(signal.SIGKILL)
    assert main.ended(time.monotonic() + SECONDS)
    assert main.returncode == 1
    assert f"another rank has ended: rank 1 on {node_name()} was killed, or lost with its node" in main.said()


def test_failing_rank_tells_the_others_why(start: Callable[..., Any], recipe: Path, tmp_path: Path):
    run = train(start, recipe, tmp_path)
    (worker,) = psutil.Process(run.all[1].pid).children()
    worker.kill()
    main, other = run.outputs()
    assert [rank.returncode for rank in run.all] == [1, 1]
    why = f"a data worker (process {worker.pid}) was killed by SIGKILL"
    assert f"error on rank 1: {why}" in other
    assert why in main
