"""What the tests of several folders need: one thread, and real runs."""

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.processes import Processes, starter


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads only get into each other's way on tensors this small: up to a hundred times slower on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def start_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Processes]]:
    """Starts ranks whose runs several tests read; `processes.starter` says how."""
    with starter(tmp_path_factory.mktemp("cwd")) as starts:
        yield starts
