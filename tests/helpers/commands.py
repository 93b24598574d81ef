"""`python pretrain/run.py ...` as a user starts it: a process of its own from the beginning.

Unlike the ranks of processes.py it is not forked: one that has asked for a GPU hands no usable CUDA to its children.
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

# Of the environment: what a launcher sets, and where to keep compiled code, which importing torch's compiler sets.
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


class Command:
    """A run of pretrain/run.py, for whoever waits for `Processes` as well."""

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
        """SIGKILL to it and its loader's workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(60)

    def outputs(self, timeout: float = SECONDS) -> list[str]:
        """Waits; what it said. If it takes longer it is killed, and the test fails with what it said."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"killed after {timeout} seconds:\n{self._said.read_text()}")
        return [self._said.read_text()]

    def finish(self, timeout: float = SECONDS) -> str:
        """Waits; what it said. Fails the test unless it ended well."""
        (output,) = self.outputs(timeout)
        assert self.returncode == 0, output
        return output
