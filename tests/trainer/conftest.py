"""Fixtures of the trainer's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers.ending import Ended

from pretrain.trainer import watchdog


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def ends_by_raising(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watchdogs poll quickly, and raise `Ended` with the exit code where they would end the process."""

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(watchdog, "exit_process", end)
    monkeypatch.setattr(watchdog, "POLL", 0.01)
    monkeypatch.setattr(watchdog, "_GRACE", 0.05)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *arguments, **keys: None)
