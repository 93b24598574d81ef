"""A running Slurm cluster and its jobs, as used by the tests."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.waiting import SECONDS

NAMESPACES = ["--mount", "--uts", "--net", "--pid"]
_OVER = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")


class Cluster:
    """A running Slurm cluster, seen from the project folder in which jobs are submitted."""

    def __init__(self, shell: int, folder: Path, project: Path):
        self.folder, self.project = folder, project
        # env -C: a working directory does not survive the change of the mount namespace.
        self._enter = ["nsenter", f"--target={shell}", *NAMESPACES, "env", "-C", str(project)]
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self._environment["SLURM_CONF"] = str(folder / "slurm.conf")
        self._environment["CUDA_VISIBLE_DEVICES"] = ""  # two nodes on one machine must not share its GPU

    def run(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node without checking its exit code."""
        place = ["env", "-C", str(cwd)] if cwd else []
        return subprocess.run(
            [*self._enter, *place, *command], env=self._environment, capture_output=True, text=True, timeout=SECONDS
        )

    def ask(self, *command: str) -> str:
        """Return the output of a command that must succeed."""
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *options: str) -> "Job":
        """`sbatch OPTIONS`."""
        return Job(self, self.ask("sbatch", "--parsable", *options))

    def restart_daemons(self, node: str) -> None:
        """Restart Slurm's daemons on the main node and on one other node, while jobs keep running."""
        self.ask("bash", "-c", f"kill $(cat {self.folder}/slurmctld.pid) && sleep 1 && slurmctld")
        daemon = f"{self.folder}/slurmd.{node}.pid"
        self.ask(
            "bash",
            "-c",
            f'nsenter --net --uts --target="$(cat {daemon})" bash -c "kill $(cat {daemon}); sleep 1; slurmd"',
        )
        deadline = time.monotonic() + SECONDS
        while self.run("scontrol", "ping").returncode:
            assert time.monotonic() < deadline
            time.sleep(0.25)

    def wait_empty(self) -> None:
        """Wait until the job queue is empty."""
        deadline = time.monotonic() + SECONDS
        while queue := self.ask("squeue", "--noheader"):
            assert time.monotonic() < deadline, queue
            time.sleep(0.25)


class Job:
    """A submitted job."""

    def __init__(self, cluster: Cluster, number: str):
        self.cluster, self.number = cluster, number

    def show(self) -> dict[str, str]:
        """Return the fields of `scontrol show job`."""
        words = self.cluster.ask("scontrol", "show", "job", "--oneliner", self.number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, what: str, happened: Callable[[], bool]) -> None:
        """Poll until it happens; fails the test with all logs on timeout or if the job ends without it."""
        deadline = time.monotonic() + SECONDS
        while not happened():
            state = self.show()["JobState"]
            over = state in _OVER
            if (over and not happened()) or time.monotonic() > deadline:
                pytest.fail(f"job {self.number} is {state}, and not: {what}\n{self.logs()}")
            time.sleep(0.25)

    def wait_end(self) -> dict[str, str]:
        """Wait until the job is finally over and return its last `show`."""
        self.wait_for("at its end", lambda: self.show()["JobState"] in _OVER)
        return self.show()

    def logs(self) -> str:
        """Return all logs of the job, each under its file name."""
        project = self.cluster.project
        files = [*project.glob(f"*-{self.show()['JobId']}.out"), *sorted(project.glob(f"slurm/logs/*-{self.number}/*"))]
        return "\n".join(f"--- {path.relative_to(project)}\n{path.read_text()}" for path in files)
