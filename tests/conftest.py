"""Fixtures shared by several test folders: single-threaded torch, and real training runs."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.processes import Processes, starter

# On tensors this small, extra threads only contend: up to a hundred times slower on a busy machine. The variable is for
# the processes that tests start. Ranks forked from a server keep the OpenMP thread count that it started with.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def start_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Processes]]:
    """Starts ranks whose runs several tests read; see `processes.starter` for the arguments."""
    with starter(tmp_path_factory.mktemp("cwd")) as starts:
        yield starts
