"""The folder of a run: who may write to it, what a refused one leaves, and where what is compiled goes."""

import errno
import fcntl
import os
import re
import socket
from pathlib import Path

import pytest
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from pretrain.trainer.run_folder import RunFolder


def test_what_is_compiled_goes_into_the_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also when an import has already set torch's default."""
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    assert cache_dir() == default_cache_dir(), "torch sets the variable itself"
    RunFolder(tmp_path / "run").cache_compiled()
    assert cache_dir() == str(tmp_path / "run/compiled/torchinductor")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "run/compiled/triton")


def test_the_environments_own_caches_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/cache/inductor")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/cache/triton")
    RunFolder(tmp_path / "run").cache_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/cache/inductor"
    assert os.environ["TRITON_CACHE_DIR"] == "/cache/triton"


def test_a_second_run_is_told_how_to_stop_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = RunFolder(tmp_path / "mine"), RunFolder(tmp_path / "mine")
    for job, stop in ((None, f"`kill {os.getpid()}`"), ("77", "`scancel 77`")):
        monkeypatch.setenv("SLURM_JOB_ID", job or "")
        here = f"{socket.gethostname()} (process {os.getpid()}, since "
        said = f"another run is writing to {tmp_path / 'mine'}: run {stop} on {here}"
        with (
            first.locked(),
            pytest.raises(
                ValueError,
                match=re.escape(said)
                + r".*to save and stop it, then the same command again to continue it.*another name=",
            ),
            second.locked(patience=0),
        ):
            pass
    with second.locked(patience=0):
        pass


def test_a_folder_that_was_moved_away_is_not_made_again(tmp_path: Path):
    folder = RunFolder(tmp_path / "mine")
    with folder.locked():
        folder.check_in_place()
        folder.root.rename(tmp_path / "moved")
        with pytest.raises(ValueError, match="mine was moved, deleted or replaced while the run was writing to it"):
            folder.check_in_place()
        with RunFolder(tmp_path / "mine").locked(), pytest.raises(ValueError, match="put it back"):
            folder.check_in_place()


def test_a_file_system_without_locks_is_said_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")  # Lustre without -o flock

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunFolder(tmp_path / "mine").locked(patience=0):
        assert "has no locks ([Errno 38] Function not implemented)" in caplog.text


def end(folder: RunFolder, error: Exception, *written: Path) -> None:
    """A run that writes some files, and ends by an error."""
    with folder.locked():
        for path in written:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        raise error


def test_refused_settings_leave_no_folder(tmp_path: Path):
    folder = RunFolder(tmp_path / "runs" / "refused")
    with pytest.raises(ValueError, match="of the settings"):
        end(folder, ValueError("of the settings"), folder.logs / "rank0.log")
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("written", ["config.yaml", "checkpoints/step_00000001/manifest.json"])
def test_what_a_run_has_written_stays(written: str, tmp_path: Path):
    folder = RunFolder(tmp_path / "started")
    path = folder.root / written
    with pytest.raises(ValueError, match="after some steps"):
        end(folder, ValueError("after some steps"), path)
    assert path.exists()
    path.unlink()
    with pytest.raises(ValueError, match="again"):
        end(folder, ValueError("again"))
    assert folder.root.exists(), "this command has not made it"


def test_an_unexpected_error_leaves_its_traceback(tmp_path: Path):
    folder = RunFolder(tmp_path / "failed")
    with pytest.raises(RuntimeError, match="a bug"):
        end(folder, RuntimeError("a bug"), folder.logs / "rank0.log")
    assert (folder.logs / "rank0.log").exists()
