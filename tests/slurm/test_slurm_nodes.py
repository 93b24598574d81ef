"""Bad, drained and lost nodes, restarted daemons, and arrays of jobs that continue one run."""

import json
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.slurm_cluster import Cluster, Job
from helpers.slurm_runs import STEPS, check_same_end, rank_process, rows, submit, wait_step

pytestmark = pytest.mark.slurm


def test_array_continues_a_run_across_a_drained_node_and_restarted_daemons(
    cluster: Cluster, recipe: Path, whole: Path
) -> None:
    """Two ranks on a node that is drained. The second job continues on the other node, the third has nothing to do."""
    array = submit(cluster, recipe, "name=chained", ranks=2, nodes="1", options=["--array=1-3%1"])
    first, second, third = (Job(cluster, f"{array.number}_{element}") for element in (1, 2, 3))
    folder = cluster.project / "runs" / "chained"
    wait_step(first, folder, 12)
    node = first.show()["BatchHost"]
    try:
        cluster.ask("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
        cluster.restart_daemons(node)
        # Not `ask`: right after its daemons have restarted, scancel signals the job and complains all the same.
        cluster.run("scancel", "--batch", "--signal=USR1", first.show()["JobId"])
        end = first.wait_end()
        assert (end["JobState"], end["Restarts"], end["BatchHost"]) == ("COMPLETED", "0", node), first.logs()
        assert "stopped by a signal: the next job of the array continues" in first.logs()
        assert len(rows(folder)) < STEPS
        check_same_end(second, folder, whole, restarts=0)
        assert second.show()["BatchHost"] != node
        assert third.wait_end()["JobState"] == "COMPLETED"
        assert "the run is finished: nothing left to do" in third.logs()
    finally:
        cluster.ask("scontrol", "update", f"nodename={node}", "state=resume")


def test_node_with_a_killed_rank_is_excluded(cluster: Cluster, recipe: Path, whole: Path) -> None:
    job, folder = submit(cluster, recipe, "name=bad", ranks=2, nodes="1"), cluster.project / "runs" / "bad"
    wait_step(job, folder, 12)
    bad = job.show()["BatchHost"]
    os.kill(rank_process(1, "name=bad"), signal.SIGKILL)
    check_same_end(job, folder, whole, restarts=1)
    end = job.show()
    assert (end["ExcNodeList"], end["BatchHost"] != bad) == (bad, True)
    assert f"{bad} seems to be bad and is excluded from this job" in job.logs()
    assert "a node is bad: requeued" in job.logs()


def test_run_continues_on_half_of_its_nodes(cluster: Cluster, recipe: Path, whole: Path) -> None:
    """Two of four nodes are lost and the job is told to use the other two: ZeRO-1 continues on two ranks."""
    job = submit(cluster, recipe, "name=half", nodes="4", options=["--partition=wide"])
    folder = cluster.project / "runs" / "half"
    wait_step(job, folder, 12)
    try:
        cluster.ask("scontrol", "update", "nodename=node[2,4]", "state=down", "reason=test")
        job.wait_for("requeued", lambda: job.show()["Restarts"] == "1")
        # Drained, since nodes that are down come back by themselves.
        cluster.ask("scontrol", "update", "nodename=node[2,4]", "state=drain", "reason=test")
        cluster.ask("scontrol", "update", f"jobid={job.number}", "numnodes=2-2", "numtasks=2")
        end = job.wait_end()
    finally:
        cluster.run("scontrol", "update", "nodename=node[2,4]", "state=resume")
    assert (end["JobState"], end["Restarts"], end["NumNodes"]) == ("COMPLETED", "1", "2"), job.logs()
    assert json.loads((folder / "environment.json").read_text())["world_size"] == 2
    assert [row["step"] for row in rows(folder)] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([row["loss"] for row in rows(folder)], [row["loss"] for row in rows(whole)], rtol=1e-3)


def test_pack_job_writes_the_same_shards(cluster: Cluster, images: Path, shards: Path, tmp_path: Path) -> None:
    shape = ["--parsable", "--cpus-per-task=1", "--mem=1G"]
    job = Job(cluster, cluster.ask("sbatch", *shape, "slurm/pack.sh", str(images), str(tmp_path / "packed")))
    end = job.wait_end()
    assert (end["JobState"], end["ExitCode"]) == ("COMPLETED", "0:0"), job.logs()
    packed = sorted(path.name for path in (tmp_path / "packed").iterdir() if path.suffix == ".tar")
    assert packed == sorted(path.name for path in shards.iterdir() if path.suffix == ".tar")
    for name in packed:
        assert subprocess.run(["cmp", str(tmp_path / "packed" / name), str(shards / name)]).returncode == 0
