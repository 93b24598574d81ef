"""The ranks of a real run of `pretrain/run.py`, or of another entry."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = str(ROOT / "pretrain" / "run.py")
CLASSIFY = str(ROOT / "downstream" / "classify" / "run.py")


class Processes:
    """The ranks of one run, started as a launcher would, without a launcher's seconds."""

    def __init__(self, script: str, arguments: list[str], count: int, cwd: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.all = [
            subprocess.Popen(
                [sys.executable, script, *arguments],
                cwd=cwd,
                env={
                    **os.environ,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(count),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": str(ROOT),
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            for rank in range(count)
        ]

    def kill(self) -> None:
        """SIGKILL to every rank and its loader's workers."""
        for process in self.all:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.all:
            process.wait()

    def outputs(self, timeout: float = 120) -> list[str]:
        """Waits; what each rank said. A run that takes longer is killed, and fails the test with what it said."""
        try:
            return [process.communicate(timeout=timeout)[0] for process in self.all]
        except subprocess.TimeoutExpired:
            self.kill()
            said = "\n".join(process.communicate()[0] for process in self.all)
            pytest.fail(f"killed after {timeout} seconds:\n{said}")

    def finish(self, timeout: float = 120) -> str:
        """Waits; the main rank's output. Fails the test, with all output, unless every rank ended well."""
        outputs = self.outputs(timeout)
        assert all(process.returncode == 0 for process in self.all), "\n".join(outputs)
        return outputs[0]


@contextlib.contextmanager
def starter(cwd: Path) -> Iterator[Callable[..., Processes]]:
    """start(recipe, 'key=value', ...) -> Processes of run.py; what is left running at the end is killed."""
    started: list[Processes] = []

    def start(*arguments: Path | str, processes: int = 2, script: str = RUN) -> Processes:
        started.append(Processes(script, [str(argument) for argument in arguments], processes, cwd))
        return started[-1]

    try:
        yield start
    finally:
        for run in started:
            if any(process.poll() is None for process in run.all):
                run.kill()
