"""Which checkpoints stay, which are set aside, and what is taken for damage."""

import errno
import json
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
    """The steps that stay, of checkpoints of a GB each."""
    steps = sorted({newest, *others, *damaged}, reverse=True)
    found = [Stored(str(step), step, 10**9, "cut off" if step in damaged else None) for step in steps]
    sound = next(one for one in found if one.step == newest)
    return sorted(int(name) for name in why_kept(found, sound, CheckpointConfig(**keys), bytes_beside))


def test_the_last_ones_and_multiples_stay():
    assert kept(40, 10, 20, 30, keep_last=1) == [40]
    assert kept(40, 10, 20, 30, keep_last=3) == [20, 30, 40]
    assert kept(40, 10, 20, 30, keep_last=1, keep_every_steps=20) == [20, 40]
    assert kept(40, 10, 30, damaged=(20, 35), keep_last=2, keep_every_steps=20) == [30, 40], "damaged ones do not count"


def test_what_was_just_written_stays_whatever_is_of_later_steps():
    assert kept(15, 10, damaged=(20,), keep_last=1, keep_every_steps=10) == [10, 15, 20]
    assert kept(15, 10, damaged=(20,), keep_last=1, keep_every_steps=10, max_gb=0.5) == [15]


def test_a_bound_in_gigabytes_lets_the_oldest_go_first():
    assert kept(40, 10, 20, 30, keep_last=4, max_gb=3) == [20, 30, 40]
    assert kept(40, 10, 20, 30, keep_last=4, max_gb=3, bytes_beside=10**9) == [30, 40]
    assert kept(40, 10, 20, 30, keep_last=4, max_gb=2.5) == [30, 40]
    assert kept(40, 10, 20, 30, keep_last=1, keep_every_steps=10, max_gb=2) == [30, 40]


def test_damaged_ones_are_set_aside_and_go_first_where_there_is_a_bound(tmp_path: Path):
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


def edit(checkpoint: Path, change: Callable[[dict[str, Any]], object], anew: bool = False) -> None:
    """Changes a manifest; `anew`: as older ones are, without a checksum."""
    content = json.loads((checkpoint / MANIFEST).read_text())
    change(content)
    if anew:
        del content["crc32"]
    (checkpoint / MANIFEST).write_text(json.dumps(content))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    training = Training(tmp_path / "checkpoints", keep_last=2)
    training.save(45)
    checkpoint = training.folder / checkpoint_name(45)
    assert damage(checkpoint) is None
    return checkpoint


def test_a_manifest_that_was_changed_is_damaged(saved: Path):
    edit(saved, lambda content: content["state"].update(step=46))
    assert damage(saved) == f"{MANIFEST} differs from what was written"
    with pytest.raises(ValueError, match="differs from what was written"):
        read_state(saved)


def test_a_manifest_of_before_there_were_checksums_of_it_is_read(saved: Path):
    edit(saved, lambda content: None, anew=True)
    assert damage(saved) is None
    assert read_state(saved) == TrainState(step=45)
    (saved / "weights.pt").write_bytes(b"")
    assert damage(saved, read=False) == "weights.pt differs from what was written"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content["files"].clear(), "lists no files"),
        (lambda content: content.pop("files"), "lists no files"),
        (lambda content: content.pop("state"), "has no valid run state"),
        (lambda content: content["state"].update(nonsense=1), "has no valid run state"),
        (lambda content: content["files"].update({"../../x": [1, 1]}), "was not written by this project"),
        (lambda content: content["files"].update({"x": "1"}), "was not written by this project"),
    ],
)
def test_a_manifest_that_says_too_little_or_too_much_is_damaged(change: Any, said: str, saved: Path):
    edit(saved, change, anew=True)
    assert said in (damage(saved) or "")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[1]", b"{"])
def test_rubbish_in_place_of_a_manifest_is_damaged(content: bytes, saved: Path):
    (saved / MANIFEST).write_bytes(content)
    assert MANIFEST in (damage(saved) or "")


def test_a_disk_that_cannot_be_read_is_damage_and_an_older_one_is_taken(
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
    assert training.start() == 10
    assert "step_00000020 is damaged and skipped: weights.pt cannot be read: [Errno 5]" in caplog.text


def test_a_copy_under_another_steps_name_is_not_sound(saved: Path):
    copied = saved.with_name(checkpoint_name(99))
    saved.rename(copied)
    assert "says step 45: another checkpoint was copied here" in str(checkpoint_layout.damage(copied))


def test_a_state_is_the_same_when_it_is_read_back(saved: Path):
    """Checksums of JSON: keys become text, tuples lists."""
    state = TrainState(step=1, shards={"b": [1, 2], "a": [3, 4]}, resume_signature={"é": 1e-3, "sizes": [(1, 2)]})
    text = checkpoint_layout.manifest_text(state, {"weights.pt": [1, 2]})
    (saved / MANIFEST).write_text(text)
    assert asdict(read_state(saved)) == json.loads(json.dumps(asdict(state)))
