"""What the tests of several folders need: one thread, and real runs."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.processes import Processes, starter

# Threads only get into each other's way on tensors this small: up to a hundred times slower on a busy machine. The
# variable is for all processes that tests start: those forked from a server have OpenMP's threads from its start.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def start_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Processes]]:
    """Starts ranks whose runs several tests read; `processes.starter` says how."""
    with starter(tmp_path_factory.mktemp("cwd")) as starts:
        yield starts
