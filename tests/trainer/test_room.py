"""A disk without room for a single checkpoint is reported before the first step."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from pretrain.trainer.assemble import _no_room
from pretrain.trainer.preflight import room_problem


@pytest.mark.parametrize(("free", "step", "rejected"), [(12_000, 0, False), (11_999, 5, True), (0, 10, False)])
def test_disk_needs_room_for_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, step: int, rejected: bool
):
    """1,000 trained weights with two moments each. A finished run saves nothing."""
    module = nn.ModuleList([nn.Linear(100, 10, bias=False), nn.Linear(3, 3).requires_grad_(False)])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    run: Any = SimpleNamespace(
        engine=SimpleNamespace(module=module),
        folder=SimpleNamespace(root=tmp_path),
        state=SimpleNamespace(step=step),
        total_steps=10,
    )
    message = _no_room(run) or ""
    assert ("a checkpoint takes at least" in message) == rejected


def test_what_a_killed_save_left_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The run deletes it before it saves."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    left = tmp_path / "checkpoints" / "unfinished" / "step_00000010"
    left.mkdir(parents=True)
    (left / "weights.pt").write_bytes(bytes(12_000))
    assert room_problem(tmp_path, 1000) is None
    assert room_problem(tmp_path, 1001)


def test_folder_that_does_not_exist_yet_is_on_its_parents_disk(tmp_path: Path):
    assert room_problem(tmp_path / "runs" / "new", 1000) is None
    assert str(tmp_path / "runs" / "new") in (room_problem(tmp_path / "runs" / "new", 10**18) or "")
