"""Jobs that are slowed down until they run into Slurm's time limit of three minutes."""

from pathlib import Path

import pytest
from helpers.slurm_cluster import Cluster
from helpers.slurm_runs import STEPS, check_same_end, rows, submit

pytestmark = pytest.mark.slurm

# Slurm checks every half minute, so it warns up to 30 seconds early and ends a job up to 30 seconds late.
LIMIT = ("--time=3", "--signal=B:USR1@1")

# For ranks that import this, while the marker files exist: reading an image takes two seconds, and syncing a file of
# a checkpoint takes ten minutes.
SLOW = """
import os, time

def slowed(call, file, seconds, part):
    def slow(descriptor, *arguments):
        if os.path.exists(file) and part in os.readlink(f"/proc/self/fd/{{descriptor}}"):
            time.sleep(seconds)
        return call(descriptor, *arguments)
    return slow

os.pread = slowed(os.pread, "{folder}/reading", 2.0, ".tar")
os.fsync = slowed(os.fsync, "{folder}/saving", 600, "step_00000020")
"""


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """The folder of the marker files, which goes on PYTHONPATH."""
    (tmp_path / "sitecustomize.py").write_text(SLOW.format(folder=tmp_path))
    return tmp_path


def test_job_is_requeued_before_its_time_limit(cluster: Cluster, recipe: Path, whole: Path, slow: Path) -> None:
    (slow / "reading").touch()
    job = submit(cluster, recipe, "name=limited", options=LIMIT, PYTHONPATH=slow)
    job.wait_for("requeued", lambda: job.show()["Restarts"] == "1")
    (slow / "reading").unlink()
    folder = cluster.project / "runs" / "limited"
    assert 0 < len(rows(folder)) < STEPS
    check_same_end(job, folder, whole, restarts=1)
    assert "stopped by a signal: requeued" in job.logs()
    logs = cluster.project / "slurm" / "logs" / f"pretrain_vitb-{job.number}"
    assert [path.name for path in logs.glob("*-stopped")] == ["attempt0-stopped"]


def test_time_limit_during_a_save_loses_only_that_checkpoint(
    cluster: Cluster, recipe: Path, whole: Path, slow: Path
) -> None:
    """A single task, which starts two ranks."""
    (slow / "saving").touch()
    shape = {"nodes": "1", "RANKS_PER_NODE": 2, "PYTHONPATH": slow}
    job = submit(cluster, recipe, "name=saving", options=LIMIT, **shape)
    assert job.wait_end()["JobState"] == "TIMEOUT", job.logs()
    cluster.wait_empty()
    (slow / "saving").unlink()
    folder = cluster.project / "runs" / "saving"
    assert 20 <= len(rows(folder)) < STEPS
    again = submit(cluster, recipe, "name=saving", **shape)
    check_same_end(again, folder, whole, restarts=0)
    assert "resumes from step_00000010" in again.logs()
