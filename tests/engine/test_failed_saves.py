"""Training continues if a rank cannot write its checkpoint, and ends if the run folder was moved."""

import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.rank_checks import newest, wait_for
from helpers.waiting import SECONDS

from pretrain.trainer.checkpoint_layout import damage
from pretrain.trainer.metrics import read_metrics

pytestmark = pytest.mark.engine


def test_moved_run_folder_ends_the_run_and_is_not_recreated(start: Callable[..., Any], recipe: Path, tmp_path: Path):
    run = start(recipe, "train.epochs=1000", "checkpoint.every_steps=2")
    folder = tmp_path / "runs" / "tiny"
    wait_for(folder / "checkpoints" / "latest", run)
    folder.rename(folder.with_name("moved"))
    output = "".join(run.outputs())
    assert all(process.returncode == 1 for process in run.all), output
    assert "tiny was moved, deleted or replaced while the run was writing to it: put it back" in output
    assert not (folder / "checkpoints").exists()


def test_failed_write_on_one_rank_is_reported_and_training_continues(
    start: Callable[..., Any], recipe: Path, tmp_path: Path
):
    """For a while the kernel limits its files to 1 KB, as a quota would."""
    run = start(recipe, "train.epochs=1000", "train.ds_config=zero1", "checkpoint.every_steps=2")
    folder = tmp_path / "runs" / "tiny"
    wait_for(folder / "checkpoints" / "latest", run)
    main, other = run.all
    unlimited = resource.prlimit(other.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(other.pid, resource.RLIMIT_FSIZE, (1024, unlimited[1]))
    deadline = time.monotonic() + SECONDS
    while "File too large; training continues" not in main.said():
        assert time.monotonic() < deadline, main.said()
        time.sleep(0.05)
    kept = newest(folder)
    assert damage(folder / "checkpoints" / kept) is None
    resource.prlimit(other.pid, resource.RLIMIT_FSIZE, unlimited)
    while newest(folder) == kept:
        assert time.monotonic() < deadline, main.said()
        time.sleep(0.05)
    other.send_signal(signal.SIGTERM)
    assert "saved and stopped after step" in run.finish()
    assert damage(folder / "checkpoints" / newest(folder)) is None
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "no step was lost"
    stalls = [row for row in rows if "checkpoint_stall_s" in row]
    assert len(stalls) > 1
    assert all(0 < row["checkpoint_stall_share"] <= 1 for row in stalls)
