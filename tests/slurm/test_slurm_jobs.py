"""Training jobs on two nodes give the same result after every kind of interruption that Slurm knows."""

import json
import os
import re
import signal
from pathlib import Path

import psutil
import pytest
from helpers.slurm_cluster import Cluster
from helpers.slurm_runs import ODD, STEPS, check_same_end, rank_process, rows, submit, wait_step
from safetensors.torch import load_file

pytestmark = pytest.mark.slurm


def test_two_nodes_train_to_the_end(whole: Path) -> None:
    assert [row["step"] for row in rows(whole)] == list(range(1, STEPS + 1))
    environment = json.loads((whole / "environment.json").read_text())
    assert (environment["world_size"], environment["host"], ODD in environment["command"]) == (2, "node1", True)
    for name in ("config.yaml", "encoder.safetensors", "loss.png", "reconstructions.png", "checkpoints/latest"):
        assert (whole / name).is_file()


def test_preempted_job_continues(cluster: Cluster, recipe: Path, whole: Path) -> None:
    job, folder = submit(cluster, recipe, "name=preempted"), cluster.project / "runs" / "preempted"
    wait_step(job, folder, 12)
    cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap=true", "--output=/dev/null")
    check_same_end(job, folder, whole, restarts=1)
    assert "SIGTERM: saved and stopped after step" in job.logs()


def test_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, recipe: Path) -> None:
    job, folder = submit(cluster, recipe, "name=cancelled"), cluster.project / "runs" / "cancelled"
    wait_step(job, folder, 12)
    cluster.ask("scancel", job.number)
    assert job.wait_end()["JobState"] == "CANCELLED"
    cluster.wait_empty()
    assert "SIGTERM: saved and stopped after step" in job.logs()
    assert job.show()["Restarts"] == "0"


def test_lost_node_costs_only_the_steps_since_the_checkpoint(cluster: Cluster, recipe: Path, whole: Path) -> None:
    job, folder = submit(cluster, recipe, "name=lost"), cluster.project / "runs" / "lost"
    wait_step(job, folder, 12)
    cluster.ask("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    job.wait_for("requeued", lambda: job.show()["Restarts"] == "1")
    # Not `ask`: the node may have come back by itself, and then there is nothing to resume.
    cluster.run("scontrol", "update", "nodename=node2", "state=resume")
    check_same_end(job, folder, whole, restarts=1)


def test_killed_rank_fails_the_job_and_the_same_command_continues(cluster: Cluster, recipe: Path, whole: Path) -> None:
    job, folder = submit(cluster, recipe, "name=killed"), cluster.project / "runs" / "killed"
    wait_step(job, folder, 12)
    os.kill(rank_process(1, "name=killed"), signal.SIGKILL)
    end = job.wait_end()
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("FAILED", "0", "137:0"), job.logs()
    assert "a rank ended with exit code 137" in job.logs()
    assert "node2 seems to be bad but is not excluded: partition main has no node to spare" in job.logs()
    check_same_end(submit(cluster, recipe, "name=killed"), folder, whole, restarts=0)


def test_hung_job_reports_where_and_continues(cluster: Cluster, recipe: Path, whole: Path) -> None:
    job, folder = submit(cluster, recipe, "name=hung", "watchdog.step_minutes=0.5"), cluster.project / "runs" / "hung"
    wait_step(job, folder, 12)
    (worker,) = psutil.Process(rank_process(1, "name=hung")).children()
    os.kill(worker.pid, signal.SIGSTOP)
    check_same_end(job, folder, whole, restarts=1)
    assert "(stopped): it was stopped (SIGSTOP)" in job.logs()
    assert "ended by the watchdog" in job.logs()


def test_job_without_progress_is_requeued_once(cluster: Cluster, recipe: Path) -> None:
    """Its limits are so low that the watchdog ends it in whatever phase it is, and it is not to save until then."""
    limits = (f"watchdog.{phase}_minutes=0.0001" for phase in ("start", "first_step", "step"))
    job = submit(cluster, recipe, "name=stuck", "train.epochs=1000", "checkpoint.every_steps=7000", *limits)
    end = job.wait_end()
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("FAILED", "1", "75:0"), job.logs()
    assert "neither this attempt nor the one before it has saved a checkpoint" in job.logs()


def test_finetuning_is_requeued_and_evaluates_each_epoch_once(cluster: Cluster, tuning: Path, whole: Path) -> None:
    """Starts from a pretrained encoder, and evaluates an odd number of images, each of which counts once."""
    start, folder = f"start.checkpoint={whole}", cluster.project / "runs" / "tuned"
    job = submit(cluster, tuning, start, "name=tuned", script="slurm/finetune_in1k.sh")
    wait_step(job, folder, 2)
    cluster.ask("scancel", "--batch", "--signal=USR1", job.number)
    end = job.wait_end()
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), job.logs()
    assert re.search(r"stopped by a signal: requeued(?s:.*)resumes from step_", job.logs()), job.logs()
    assert [row["step"] for row in rows(folder)] == list(range(1, 4 * 7 + 1))
    measured = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    assert [(row["step"], row["images"]) for row in measured] == [(7 * epoch, 61) for epoch in range(1, 5)]
    assert load_file(folder / "model.safetensors")["head.weight"].shape == (2, 192)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.global_batch_siz=8",
            "error: unknown key train.global_batch_siz: did you mean train.global_batch_size?",
        ),
        ("data.shards=/nowhere/shards", "/nowhere/shards"),
    ],
)
def test_failure_is_reported_and_not_requeued(cluster: Cluster, recipe: Path, override: str, message: str) -> None:
    job = submit(cluster, recipe, "name=wrong", override, ranks=2)
    end = job.wait_end()
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("FAILED", "0", "1:0"), job.logs()
    assert message in (cluster.project / f"pretrain_vitb-{job.number}.out").read_text(), job.logs()
