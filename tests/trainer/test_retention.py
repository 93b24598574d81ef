"""Which checkpoints are kept, which are set aside, and what counts as damage."""

import errno
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoint_stubs import Training

from pretrain.trainer import checkpoint_layout
from pretrain.trainer.checkpoint_layout import MANIFEST, TrainState, checkpoint_name, damage, read_state
from pretrain.trainer.config import CheckpointConfig
from pretrain.trainer.retention import Stored, why_kept

pytestmark = pytest.mark.usefixtures("process_group")


def kept(newest: int, *others: int, damaged: tuple[int, ...] = (), bytes_beside: int = 0, **keys: Any) -> list[int]:
    """The steps that are kept, of checkpoints of 1 GB each."""
    steps = sorted({newest, *others, *damaged}, reverse=True)
    found = [Stored(str(step), step, 10**9, "cut off" if step in damaged else None) for step in steps]
    sound = next(one for one in found if one.step == newest)
    return sorted(int(name) for name in why_kept(found, sound, CheckpointConfig(**keys), bytes_beside))


def test_last_checkpoints_and_multiples_are_kept():
    assert kept(40, 10, 20, 30, keep_last=1) == [40]
    assert kept(40, 10, 20, 30, keep_last=3) == [20, 30, 40]
    assert kept(40, 10, 20, 30, keep_last=1, keep_every_steps=20) == [20, 40]
    assert kept(40, 10, 30, damaged=(20, 35), keep_last=2, keep_every_steps=20) == [30, 40], "damaged ones do not count"


def test_checkpoint_just_written_is_kept_despite_damaged_later_ones():
    assert kept(15, 10, damaged=(20,), keep_last=1, keep_every_steps=10) == [10, 15, 20]
    assert kept(15, 10, damaged=(20,), keep_last=1, keep_every_steps=10, max_gb=0.5) == [15]


def test_max_gb_deletes_the_oldest_first():
    assert kept(40, 10, 20, 30, keep_last=4, max_gb=3) == [20, 30, 40]
    assert kept(40, 10, 20, 30, keep_last=4, max_gb=3, bytes_beside=10**9) == [30, 40]
    assert kept(40, 10, 20, 30, keep_last=4, max_gb=2.5) == [30, 40]
    assert kept(40, 10, 20, 30, keep_last=1, keep_every_steps=10, max_gb=2) == [30, 40]


def test_damaged_checkpoints_are_set_aside_and_deleted_to_meet_max_gb(tmp_path: Path):
    training = Training(tmp_path / "checkpoints", keep_last=2)
    training.save(10, 20)
    training.damage(20)
    assert training.start() == 10
    training.save(15)
    aside = training.folder / "damaged_step_00000020"
    assert aside.is_dir()
    training.save(20)
    training.damage(20)
    assert training.start() == 15
    training.save(25)
    assert training.steps == [15, 25]
    assert [path.name for path in training.folder.glob("damaged_*")] == [aside.name]
    training.keys["max_gb"] = 1e-7
    training.start()
    training.save(30)
    assert training.steps == [30], "the one just written stays, whatever the bound"
    assert not aside.exists()


def edit(checkpoint: Path, change: Callable[[dict[str, Any]], object], without_checksum: bool = False) -> None:
    """Changes a manifest; `without_checksum` also removes its checksum, as older manifests have none."""
    content = json.loads((checkpoint / MANIFEST).read_text())
    change(content)
    if without_checksum:
        del content["crc32"]
    (checkpoint / MANIFEST).write_text(json.dumps(content))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    training = Training(tmp_path / "checkpoints", keep_last=2)
    training.save(45)
    checkpoint = training.folder / checkpoint_name(45)
    assert damage(checkpoint) is None
    return checkpoint


def test_changed_manifest_is_damaged(saved: Path):
    edit(saved, lambda content: content["state"].update(step=46))
    assert damage(saved) == f"{MANIFEST} differs from what was written"
    with pytest.raises(ValueError, match="differs from what was written"):
        read_state(saved)


def test_older_manifest_without_a_checksum_is_read(saved: Path):
    edit(saved, lambda content: None, without_checksum=True)
    assert damage(saved) is None
    assert read_state(saved) == TrainState(step=45)
    (saved / "weights.pt").write_bytes(b"")
    assert re.fullmatch("weights.pt has 0 bytes instead of [0-9]+", damage(saved, read=False) or "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["files"].clear(), "lists no files"),
        (lambda content: content.pop("files"), "lists no files"),
        (lambda content: content.pop("state"), "has no valid run state"),
        (lambda content: content["state"].update(nonsense=1), "has no valid run state"),
        (lambda content: content["files"].update({"../../x": [1, 1]}), "was not written by this project"),
        (lambda content: content["files"].update({"x": "1"}), "was not written by this project"),
    ],
)
def test_manifest_with_missing_or_invalid_content_is_damaged(change: Any, message: str, saved: Path):
    edit(saved, change, without_checksum=True)
    assert message in (damage(saved) or "")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[1]", b"{"])
def test_garbage_in_place_of_a_manifest_is_damaged(content: bytes, saved: Path):
    (saved / MANIFEST).write_bytes(content)
    assert MANIFEST in (damage(saved) or "")


def test_unreadable_checkpoint_is_skipped_for_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    training = Training(tmp_path / "checkpoints", keep_last=2)
    training.save(10, 20)
    read = checkpoint_layout.size_and_crc

    def fail(path: Path) -> list[int]:
        if path.parent.name == checkpoint_name(20):
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(checkpoint_layout, "size_and_crc", fail)
    monkeypatch.setattr(checkpoint_layout, "RETRY_AFTER", (0.0, 0.0))
    assert training.start() == 10
    assert "step_00000020 is damaged and skipped: weights.pt cannot be read: [Errno 5]" in caplog.text


def test_error_that_passes_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    training = Training(tmp_path / "checkpoints", keep_last=2)
    training.save(10, 20)
    read, errors = checkpoint_layout.size_and_crc, [OSError(errno.ESTALE, "Stale file handle")]

    def fail_once(path: Path) -> list[int]:
        if errors:
            raise errors.pop()
        return read(path)

    monkeypatch.setattr(checkpoint_layout, "size_and_crc", fail_once)
    monkeypatch.setattr(checkpoint_layout, "RETRY_AFTER", (0.0, 0.0))
    assert training.start() == 20


def test_checkpoint_under_the_name_of_another_step_is_damaged(saved: Path):
    copied = saved.with_name(checkpoint_name(99))
    saved.rename(copied)
    assert "says step 45: another checkpoint was copied here" in str(checkpoint_layout.damage(copied))


def test_state_survives_a_round_trip_through_the_manifest(saved: Path):
    """The manifest's checksum still matches, although JSON turns tuples into lists."""
    state = TrainState(step=1, shards={"b": [1, 2], "a": [3, 4]}, resume_signature={"é": 1e-3, "sizes": [(1, 2)]})
    text = checkpoint_layout.manifest_text(state, {"weights.pt": [1, 2]})
    (saved / MANIFEST).write_text(text)
    assert asdict(read_state(saved)) == json.loads(json.dumps(asdict(state)))
