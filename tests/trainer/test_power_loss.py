"""A power loss at any moment of a save leaves an intact checkpoint, and every `fsync` is needed for that."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoint_stubs import Training
from helpers.power_loss import Disk, Recorder, Step, Tree

from pretrain.trainer.checkpoint_layout import LATEST, checkpoint_names, checkpoint_step, damage

pytestmark = pytest.mark.usefixtures("process_group")
SAVED = "saved"  # a recorded step: from here on, the program takes this checkpoint for written


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The recorded steps of two saves of a run that keeps one checkpoint."""
    root = tmp_path / "disk"
    root.mkdir()
    recorder = Recorder(root, monkeypatch)
    training = Training(root / "runs" / "mine" / "checkpoints", keep_last=1)
    for step in (10, 20):
        training.save(step)
        recorder.steps.append((SAVED, str(step)))
    monkeypatch.undo()
    assert {"create", "write", "sync", "sync folder", "rename", "create folder", "remove"} < {
        s[0] for s in recorder.steps
    }
    return recorder.steps


def test_metrics_are_synced_before_latest_names_their_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    training = Training(tmp_path / "checkpoints", keep_last=1)
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n')
    recorder = Recorder(tmp_path, monkeypatch)
    training.save(10)
    monkeypatch.undo()
    named = next(number for number, step in enumerate(recorder.steps) if step[-1] == f"checkpoints/{LATEST}")
    assert ("sync", "metrics.jsonl") in recorder.steps[:named]


def first_problem(steps: Sequence[Step], folder: Path, seen: dict[Any, str | None]) -> str | None:
    """What the first harmful power loss would damage, or None. `seen` caches the problem of each state left behind."""
    disk, saved = Disk(), 0
    for number, step in enumerate(steps):
        if step[0] == SAVED:
            saved = int(step[1])
        else:
            disk.do(step)
        if step[0] == "write":  # unsynced bytes are checked at the next step of another kind
            continue
        for tree in disk.after_power_loss():
            if (key := (saved, frozenset(tree.items()))) not in seen:
                seen[key] = problem_in(tree, saved, folder)
            if seen[key]:
                return f"after step {number}, {step[:2]}: {seen[key]}"
    return None


def problem_in(tree: Tree, saved: int, folder: Path) -> str | None:
    """What is wrong with the files that a power loss left behind, or None."""
    shutil.rmtree(folder, ignore_errors=True)
    for path, content in tree.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    checkpoints = folder / "runs" / "mine" / "checkpoints"
    sound = [name for name in checkpoint_names(checkpoints) if damage(checkpoints / name) is None]
    if saved > max((checkpoint_step(name) or 0 for name in sound), default=0):
        return f"checkpoint {saved} was saved, and {sound} are sound"
    latest = checkpoints / LATEST
    if saved and not latest.is_file():
        return "there is no file latest"
    if latest.is_file() and latest.read_text() not in sound:
        return f"latest names {latest.read_text()!r}, and {sound} are sound"
    return None


def test_power_loss_is_harmless_and_every_sync_is_needed(recorded: list[Step], tmp_path: Path):
    seen: dict[Any, str | None] = {}
    assert first_problem(recorded, tmp_path / "left", seen) is None
    assert len(seen) > 50
    syncs = [number for number, step in enumerate(recorded) if step[0].startswith("sync")]
    assert len(syncs) >= 2 * 6
    for number in syncs:
        without = recorded[:number] + recorded[number + 1 :]
        assert first_problem(without, tmp_path / "left", seen), f"nothing is lost without {recorded[number]}"
