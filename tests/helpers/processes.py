"""The ranks of a real run of `pretrain/run.py` or of another script."""

import contextlib
import gc
import itertools
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

import pytest

from helpers.ports import free_port
from helpers.waiting import SECONDS
from pretrain.models import vit

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
RUN = str(ROOT / "pretrain" / "run.py")
CLASSIFY = str(ROOT / "downstream" / "classify" / "finetune.py")
SMALL = patch.dict(vit.ARCHS, vit_tiny=vit.Arch(32, 2, 2))  # gives the smallest encoder two narrow blocks

# Ranks are forked from a server that has imported slow modules, so a start takes tenths of a second instead of seconds.
# DeepSpeed is not preloaded, because it chooses its accelerator on import. Tests of launchers start new processes.
_SERVER = multiprocessing.get_context("forkserver")
_COMPILED = ["torch._dynamo.backends.debugging", "torch._inductor.compile_fx"]  # DeepSpeed uses torch.compile on import
_PRELOADED = ["torch", "timm.layers", "torchvision", "torch.utils.tensorboard", "matplotlib.pyplot", *_COMPILED]
_SERVER.set_forkserver_preload(_PRELOADED)


def preload(*modules: str) -> None:
    """Preload more modules for all ranks; must be called before the first rank starts."""
    _SERVER.set_forkserver_preload([*_PRELOADED, *modules])


class Rank:
    """A process and its output."""

    def __init__(self, process: BaseProcess, said: Path):
        self._process, self._said = process, said
        process.start()
        assert process.pid is not None
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def ended(self, deadline: float) -> bool:
        self._process.join(max(deadline - time.monotonic(), 0))
        return self.returncode is not None

    def said(self) -> str:
        return self._said.read_text() if self._said.exists() else ""


def _become(script: str, arguments: list[str], environment: dict[str, str], cwd: Path, said: Path) -> None:
    """Turn this process into `python script arguments` as a session leader."""
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # or loader workers would start from their own servers
    gc.freeze()  # DeepSpeed collects garbage often, and would go through all preloaded modules
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[:0] = [str(Path(script).parent), str(ROOT), str(TESTS)]
    sys.argv = [script, *arguments]
    with SMALL if script in (RUN, CLASSIFY) else contextlib.nullcontext():
        runpy.run_path(script, run_name="__main__")


class Processes:
    """The ranks of one run, started as by a launcher, but faster."""

    _numbers = itertools.count()

    def __init__(self, script: str, arguments: list[str], count: int, cwd: Path, port: int | None):
        port = free_port() if port is None else port
        number = next(self._numbers)
        self.all = []
        for rank in range(count):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "PYTHONUNBUFFERED": "1",
            }
            said = cwd / f"run{number}-rank{rank}.txt"
            process = _SERVER.Process(target=_become, args=(script, arguments, environment, cwd, said))
            self.all.append(Rank(process, said))

    def kill(self) -> None:
        """Send SIGKILL to every rank and its loader's workers."""
        for rank in self.all:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
        for rank in self.all:
            rank.ended(time.monotonic() + 60)

    def outputs(self, timeout: float = SECONDS) -> list[str]:
        """Wait and return the output of each rank. On timeout, kill the run and fail the test with the output."""
        deadline = time.monotonic() + timeout
        if not all(rank.ended(deadline) for rank in self.all):
            self.kill()
            pytest.fail(f"killed after {timeout} seconds:\n" + "\n".join(rank.said() for rank in self.all))
        return [rank.said() for rank in self.all]

    def finish(self, timeout: float = SECONDS) -> str:
        """Wait and return the main rank's output. Fails the test with all output unless every rank exits with 0."""
        outputs = self.outputs(timeout)
        assert all(rank.returncode == 0 for rank in self.all), "\n".join(outputs)
        return outputs[0]


@contextlib.contextmanager
def starter(cwd: Path) -> Iterator[Callable[..., Processes]]:
    """Yield start(recipe, 'key=value', ...) -> Processes of run.py; runs that are still active at the end are killed.

    Their smallest encoder is that of `SMALL`. Tests of launchers train the shipped one.
    """
    started: list[Processes] = []

    def start(*arguments: Path | str, processes: int = 2, script: str = RUN, port: int | None = None) -> Processes:
        started.append(Processes(script, [str(argument) for argument in arguments], processes, cwd, port))
        return started[-1]

    try:
        yield start
    finally:
        for run in started:
            if any(rank.returncode is None for rank in run.all):
                run.kill()
