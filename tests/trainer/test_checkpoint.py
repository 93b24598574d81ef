"""Which checkpoints a run keeps and which `latest` names, in whatever order their steps come. Without DeepSpeed."""

from pathlib import Path

import pytest
from helpers.checkpoint_stubs import Training

from pretrain.trainer.checkpoint_layout import (
    LATEST,
    checkpoint_name,
    latest_checkpoint,
)

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def test_what_is_saved_after_a_damaged_checkpoint_was_skipped_stays(folder: Path):
    """The damaged one is of a later step, and one that would be kept for good."""
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
def test_several_damaged_ones_count_for_nothing(keep_last: int, keep_every: int, folder: Path):
    training = Training(folder, keep_last=4, keep_every=keep_every)
    training.save(10, 20, 30, 35)
    training.keys["keep_last"] = keep_last
    for step in (20, 30, 35):
        training.damage(step)
    assert training.start() == 10
    training.save(15)
    assert training.steps == [10, 15][-keep_last:]
    training.save(20, 25, 33)  # 33: a signal
    assert training.steps == sorted({*[10, 15, 20, 25, 33][-keep_last:], *([20] if keep_every else [])})


@pytest.mark.parametrize("keep_last", [1, 2])
def test_the_step_of_a_damaged_one_is_written_again(keep_last: int, folder: Path):
    training = Training(folder, keep_last=keep_last, keep_every=10)
    training.save(10, 20)
    training.damage(20)
    assert training.start() == 10
    training.save(20)
    assert training.start() == 20
    assert training.steps == [10, 20]
    assert (folder / "damaged_step_00000020").is_dir()


def test_a_run_that_dies_before_it_saves_again_has_lost_nothing(folder: Path):
    training = Training(folder, keep_last=2)
    training.save(10, 20)
    training.damage(20)
    assert (training.start(), training.steps) == (10, [10, 20])
    training.damage(20)  # the same bytes in their old order: restored by somebody
    assert training.start() == 20


def test_one_that_was_cut_off_takes_no_place_among_those_kept(folder: Path):
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


def test_latest_that_names_nothing_stands_for_the_newest(folder: Path):
    assert latest_checkpoint(folder) is None
    training = Training(folder, keep_last=2)
    training.save(99_999_999, 100_000_000)
    assert training.steps[-1] == 100_000_000
    for content in (checkpoint_name(7).encode(), b"", b"\xff\xfe"):
        (folder / LATEST).write_bytes(content)
        assert latest_checkpoint(folder) == folder / checkpoint_name(100_000_000)
