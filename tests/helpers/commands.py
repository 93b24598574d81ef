"""Runs `python pretrain/run.py ...` as a user does, in a new process.

Unlike the ranks of processes.py, it is not forked: CUDA cannot be used in children of a process that has queried a GPU.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.processes import RUN
from helpers.waiting import SECONDS

# Environment variables set by launchers, and cache folders of compiled code, set by importing torch's compiler.
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


class Command:
    """A run of pretrain/run.py that can be waited for like `Processes`."""

    def __init__(self, arguments: list[str], said: Path):
        self.arguments, self._said = arguments, said
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        for name in (*LAUNCHERS, *CACHES):
            environment.pop(name, None)
        with said.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, RUN, *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=said.parent,
                start_new_session=True,
            )
        self.all = [self]

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """Send SIGKILL to the process and its loader's workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(60)

    def outputs(self, timeout: float = SECONDS) -> list[str]:
        """Wait and return the output. On timeout, kill the process and fail the test with the output."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"killed after {timeout} seconds:\n{self._said.read_text()}")
        return [self._said.read_text()]

    def finish(self, timeout: float = SECONDS) -> str:
        """Wait and return the output. Fails the test unless the process exits with 0."""
        (output,) = self.outputs(timeout)
        assert self.returncode == 0, output
        return output
