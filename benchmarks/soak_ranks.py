"""The processes of a run that `soak.py` kills and restarts."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.trainer.meeting import free_port
from pretrain.trainer.metrics import read_metrics

RUN = Path(__file__).resolve().parent.parent / "pretrain" / "run.py"
PATIENCE = 300.0  # seconds within which ranks must end by themselves, or a run must advance


class Rank:
    """A process of a run."""

    def __init__(self, process: subprocess.Popen[bytes], said: Path):
        self._process, self._said, self.pid = process, said, process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    def said(self) -> str:
        return self._said.read_text(errors="replace")


class Ranks:
    """The processes of a run, started like `srun` does: no launcher ends the others when one is gone."""

    def __init__(self, folder: Path, *arguments: str, count: int = 2):
        port = free_port()
        self.all = []
        for rank in range(count):
            said = folder / f"rank{rank}.txt"
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
            environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
            with said.open("w") as file:
                process = subprocess.Popen(
                    [sys.executable, str(RUN), *arguments],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            self.all.append(Rank(process, said))

    def kill(self) -> None:
        """Sends SIGKILL to every rank and its data workers."""
        for rank in self.all:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
        wait_until(lambda: has_ended(self), "the killed ranks to end")


def has_ended(ranks: Any) -> bool:
    """Whether all processes of a run have ended."""
    return all(rank.returncode is not None for rank in ranks.all)


def wait_until(happened: Callable[[], bool], what: str) -> None:
    """Waits for an event; raises TimeoutError after `PATIENCE`."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE:.0f} s for {what}")
        time.sleep(0.02)


def last_step(run: Path) -> int:
    """The last step that a run has logged, or 0."""
    rows = read_metrics(run / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0
