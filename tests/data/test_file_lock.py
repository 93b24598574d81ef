"""File locks: one that another process holds and does not release, and file systems that have none."""

import errno
import fcntl
from pathlib import Path

import pytest

from data import file_lock
from data.waiting import while_waiting


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file whose lock is already held."""
    monkeypatch.setattr(file_lock, "POLL", 0.01)
    with (tmp_path / ".index.npz.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield tmp_path / "index.npz"


def test_waiting_for_a_held_lock_times_out(held: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_lock, "TIMEOUT", 0.05)
    with pytest.raises(TimeoutError, match=r"another process has held .*\.index\.npz\.lock"), file_lock.locked(held):
        pass


def test_waiting_for_the_lock_can_be_interrupted(held: Path) -> None:
    class ToldToStopError(Exception):
        pass

    def look() -> None:
        raise ToldToStopError

    with pytest.raises(ToldToStopError), while_waiting(look), file_lock.locked(held):
        pass


def refuse_with(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, how: int) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(fcntl, "flock", fail)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_index_is_built_without_a_lock_where_the_file_system_has_none(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_with(number, monkeypatch)
    with file_lock.locked(tmp_path / "index.npz"):
        pass


def test_other_failures_of_a_lock_are_not_taken_for_missing_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_with(errno.EIO, monkeypatch)
    with pytest.raises(OSError, match="refused"), file_lock.locked(tmp_path / "index.npz"):
        pass
