"""The ranks of a real run of `pretrain/run.py`."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = str(ROOT / "pretrain" / "run.py")


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
            os.killpg(process.pid, signal.SIGKILL)
        self.outputs()

    def outputs(self, timeout: float = 120) -> list[str]:
        return [process.communicate(timeout=timeout)[0] for process in self.all]

    def finish(self) -> str:
        """Waits; the main rank's output. Fails the test, with the output, unless every rank ended well."""
        outputs = self.outputs()
        for process, output in zip(self.all, outputs, strict=True):
            assert process.returncode == 0, output
        return outputs[0]
