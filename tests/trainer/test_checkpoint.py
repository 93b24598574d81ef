"""Which checkpoints a run keeps and which one `latest` names, for steps in any order. Tested without DeepSpeed."""

from pathlib import Path

import pytest
from helpers.checkpoint_stubs import StubEngine, Training

from pretrain.trainer.checkpoint_layout import (
    DELETED,
    LATEST,
    UNFINISHED,
    TrainState,
    checkpoint_name,
    latest_checkpoint,
)
from pretrain.trainer.ema import NoEMA
from pretrain.trainer.retention import folder_size, leftovers, remove_leftovers

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def test_checkpoints_saved_after_skipping_a_damaged_one_are_kept(folder: Path):
    """The damaged one has a later step, which `keep_every` would keep permanently."""
    training = Training(folder, keep_last=1, keep_every=1000)
    training.save(500, 1000, 1500, 2000)
    assert training.steps == [1000, 2000]
    training.damage(2000)
    assert training.start() == 1000
    assert (folder / LATEST).read_text() == checkpoint_name(1000), "which the run has resumed from"
    training.save(1500)
    assert training.steps == [1000, 1500], "the damaged one, of steps that are trained again, is gone"
    assert training.start() == 1500
    training.save(2000, 2500)
    assert training.steps == [1000, 2000, 2500]


@pytest.mark.parametrize("keep_last", [1, 2, 3])
@pytest.mark.parametrize("keep_every", [0, 20])
def test_damaged_checkpoints_do_not_count_as_kept(keep_last: int, keep_every: int, folder: Path):
    training = Training(folder, keep_last=4, keep_every=keep_every)
    training.save(10, 20, 30, 35)
    training.keys["keep_last"] = keep_last
    for step in (20, 30, 35):
        training.damage(step)
    assert training.start() == 10
    training.save(15)
    assert training.steps == [10, 15][-keep_last:]
    training.save(20, 25, 33)  # 33: saved on a signal
    assert training.steps == sorted({*[10, 15, 20, 25, 33][-keep_last:], *([20] if keep_every else [])})


@pytest.mark.parametrize("keep_last", [1, 2])
def test_step_of_a_damaged_checkpoint_is_saved_again(keep_last: int, folder: Path):
    training = Training(folder, keep_last=keep_last, keep_every=10)
    training.save(10, 20)
    training.damage(20)
    assert training.start() == 10
    training.save(20)
    assert training.start() == 20
    assert training.steps == [10, 20]
    assert (folder / "damaged_step_00000020").is_dir()


def test_damaged_checkpoint_stays_until_the_next_save(folder: Path):
    training = Training(folder, keep_last=2)
    training.save(10, 20)
    training.damage(20)
    assert (training.start(), training.steps) == (10, [10, 20])
    training.damage(20)  # reverses the damage, as if someone had restored the file
    assert training.start() == 20


def test_damage_is_remembered_until_a_save_succeeds(folder: Path):
    training = Training(folder, keep_last=2)
    training.save(10, 20)
    training.damage(20)
    training.start()
    (folder / UNFINISHED).write_text("blocks a save")
    assert training.checkpoints.begin(StubEngine(), NoEMA(), TrainState(step=15)).wait()
    (folder / UNFINISHED).unlink()
    training.save(16)
    assert training.steps == [10, 16], "two sound ones"


def test_leftovers_of_killed_saves_and_deletions_are_deleted(folder: Path):
    for left in (folder / UNFINISHED / checkpoint_name(30), folder / f"{DELETED}{checkpoint_name(10)}"):
        left.mkdir(parents=True)
        (left / "weights.pt").write_bytes(bytes(1000))
    assert [folder_size(path) for path in leftovers(folder)] == [1000, 1000]
    (folder / "notes.txt").touch()
    remove_leftovers(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_truncated_checkpoint_does_not_count_as_kept(folder: Path):
    training = Training(folder, keep_last=2)
    training.save(10, 20)
    training.damage(20, cut_off=True)
    training.save(30)
    assert training.steps == [10, 30]


def test_only_checkpoints_are_read_and_deleted(folder: Path):
    training = Training(folder, keep_last=1)
    for name in ("step_00000005_copy", "step_00000010.bak", "step_old"):
        (folder / name).mkdir()
    training.save(10, 20)
    assert training.start() == 20
    assert sorted(path.name for path in folder.iterdir()) == [
        LATEST,
        "step_00000005_copy",
        "step_00000010.bak",
        checkpoint_name(20),
        "step_old",
    ]


def test_invalid_latest_falls_back_to_the_newest_checkpoint(folder: Path):
    assert latest_checkpoint(folder) is None
    training = Training(folder, keep_last=2)
    training.save(99_999_999, 100_000_000)
    assert training.steps[-1] == 100_000_000
    for content in (checkpoint_name(7).encode(), b"", b"\xff\xfe"):
        (folder / LATEST).write_bytes(content)
        assert latest_checkpoint(folder) == folder / checkpoint_name(100_000_000)
