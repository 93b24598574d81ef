"""The ranks' threads that write a checkpoint agree on the outcome."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.waiting import SECONDS

from pretrain.trainer.checkpoint_layout import TrainState, checkpoint_names, damage, read_files
from pretrain.trainer.config import CheckpointConfig
from pretrain.trainer.launch import World

RANKS = 3
NAME = "step_00000010"


class Meeting:
    """Stands in for a process group: every rank contributes its part and gets the parts of all ranks."""

    def __init__(self) -> None:
        self._parts: list[Any] = [None] * RANKS
        self._barrier = threading.Barrier(RANKS, timeout=SECONDS)

    def gather(self, rank: int, mine: Any) -> list[Any]:
        self._parts[rank] = mine
        self._barrier.wait()
        parts = list(self._parts)
        self._barrier.wait()
        return parts


def write(
    folder: Path, failing: int | None = None, failure: str | None = None, elsewhere: Path | None = None
) -> list[str | None]:
    """Returns each rank's result. Rank `failing` cannot write, could not copy because of `failure`, or is elsewhere."""
    from pretrain.trainer.checkpoint_writer import CheckpointWriter  # imports DeepSpeed
    from pretrain.trainer.host_copy import HostCopies

    meeting = Meeting()

    class ThreeRankWriter(CheckpointWriter):
        def _gather(self, mine: Any) -> list[Any]:
            return meeting.gather(self._world.rank, mine)

    writers = []
    for rank in range(RANKS):
        fails = rank == failing and elsewhere is None
        name = "no/such/folder.pt" if fails and failure is None else f"rank{rank}.pt"
        writers.append(
            ThreeRankWriter(
                elsewhere if elsewhere and rank == failing else folder,
                NAME,
                {name: {"w": torch.full((3,), float(rank))}},
                TrainState(step=10),
                failure if fails else None,
                damaged=set(),
                config=CheckpointConfig(),
                world=World(rank, RANKS, 0),
                group=None,
                copies=HostCopies(),
            )
        )
    return [writer.wait() for writer in writers]


def test_manifest_has_the_files_of_all_ranks(tmp_path: Path):
    assert write(tmp_path) == [None] * RANKS
    assert checkpoint_names(tmp_path) == [NAME]
    assert sorted(read_files(tmp_path / NAME)) == ["rank0.pt", "rank1.pt", "rank2.pt"]
    assert damage(tmp_path / NAME) is None
    assert not (tmp_path / "unfinished").exists()


def test_folder_that_nodes_do_not_share_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from pretrain.trainer import checkpoint_writer  # imports DeepSpeed

    monkeypatch.setattr(checkpoint_writer, "SHARED_SECONDS", 0.2)
    shared, own = tmp_path / "shared", tmp_path / "own"
    shared.mkdir()
    own.mkdir()
    for problem in write(shared, failing=2, elsewhere=own):
        assert "rank2.pt, which another rank has written, is not here: runs= must be shared" in str(problem)
    assert checkpoint_names(shared) == []


@pytest.mark.parametrize("failing", range(RANKS))
@pytest.mark.parametrize("failure", [None, "no memory can be pinned"])
def test_failure_of_one_rank_fails_the_save_on_all_ranks(failing: int, failure: str | None, tmp_path: Path):
    assert write(tmp_path) == [None] * RANKS
    before = (tmp_path / NAME / "manifest.json").read_bytes()
    (problem,) = set(write(tmp_path, failing, failure))
    assert problem
    assert f"checkpoint {NAME} could not be written" in problem
    assert (failure or "No such file or directory") in problem
    assert (tmp_path / NAME / "manifest.json").read_bytes() == before
    assert not (tmp_path / "unfinished").exists()
