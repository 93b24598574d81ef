"""The run folder: its lock, its cleanup after a failed start, and the location of compile caches."""

import errno
import fcntl
import os
import re
import socket
from pathlib import Path

import pytest
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from pretrain.trainer import run_folder
from pretrain.trainer.run_folder import RunFolder


def test_compile_caches_go_into_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Even if an import has already set torch's default."""
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    assert cache_dir() == default_cache_dir(), "torch sets the variable itself"
    RunFolder(tmp_path / "run").cache_compiled()
    assert cache_dir() == str(tmp_path / "run/compiled/torchinductor")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "run/compiled/triton")


def test_caches_set_by_the_environment_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/cache/inductor")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/cache/triton")
    RunFolder(tmp_path / "run").cache_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/cache/inductor"
    assert os.environ["TRITON_CACHE_DIR"] == "/cache/triton"


def test_second_run_is_told_how_to_stop_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = RunFolder(tmp_path / "mine"), RunFolder(tmp_path / "mine")
    for job, stop in ((None, f"`kill {os.getpid()}`"), ("77", "`scancel 77`")):
        monkeypatch.setenv("SLURM_JOB_ID", job or "")
        here = f"{socket.gethostname()} (process {os.getpid()}, since "
        expected = f"another run is writing to {tmp_path / 'mine'}: run {stop} on {here}"
        with (
            first.locked(),
            pytest.raises(
                ValueError,
                match=re.escape(expected)
                + r".*to save and stop it, then the same command again to continue it.*another name=",
            ),
            second.locked(patience=0),
        ):
            pass
    with second.locked(patience=0):
        pass


def test_moved_or_replaced_folder_is_rejected(tmp_path: Path):
    folder = RunFolder(tmp_path / "mine")
    with folder.locked():
        folder.check_in_place()
        folder.root.rename(tmp_path / "moved")
        with pytest.raises(ValueError, match="mine was moved, deleted or replaced while the run was writing to it"):
            folder.check_in_place()
        with RunFolder(tmp_path / "mine").locked(), pytest.raises(ValueError, match="put it back"):
            folder.check_in_place()


def test_file_system_without_locks_only_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")  # Lustre without -o flock

    monkeypatch.setattr(fcntl, "flock", fail)
    with RunFolder(tmp_path / "mine").locked(patience=0):
        assert "has no locks ([Errno 38] Function not implemented)" in caplog.text


def fail_run(folder: RunFolder, error: Exception, *written: Path) -> None:
    """Simulates a run that writes some files and then fails."""
    with folder.locked():
        for path in written:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        raise error


def test_rejected_settings_leave_no_folder(tmp_path: Path):
    folder = RunFolder(tmp_path / "runs" / "refused")
    with pytest.raises(ValueError, match="of the settings"):
        fail_run(folder, ValueError("of the settings"), folder.logs / "rank0.log")
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("written", ["config.yaml", "checkpoints/step_00000001/manifest.json"])
def test_files_of_a_started_run_are_kept(written: str, tmp_path: Path):
    folder = RunFolder(tmp_path / "started")
    path = folder.root / written
    with pytest.raises(ValueError, match="after some steps"):
        fail_run(folder, ValueError("after some steps"), path)
    assert path.exists()
    path.unlink()
    with pytest.raises(ValueError, match="again"):
        fail_run(folder, ValueError("again"))
    assert folder.root.exists(), "this command has not made it"


def test_log_of_an_unexpected_error_is_kept(tmp_path: Path):
    folder = RunFolder(tmp_path / "failed")
    with pytest.raises(RuntimeError, match="a bug"):
        fail_run(folder, RuntimeError("a bug"), folder.logs / "rank0.log")
    assert (folder.logs / "rank0.log").exists()


def test_folder_that_a_node_does_not_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_folder, "SHARED_SECONDS", 0.2)
    monkeypatch.setattr(run_folder.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(run_folder.dist, "get_world_size", lambda: 2)

    def broadcast(told: list[str | None]) -> None:
        told[0] = told[0] or "written by rank 0"

    def gather(seen: list[bool], mine: bool) -> None:
        seen[:] = [True, mine]

    monkeypatch.setattr(run_folder.dist, "broadcast_object_list", broadcast)
    monkeypatch.setattr(run_folder.dist, "all_gather_object", gather)
    folder = RunFolder(tmp_path)
    with pytest.raises(ValueError, match=r"rank 1 does not see .*: all nodes must share the folder that runs= names"):
        folder._check_shared(None)
    folder.lock.write_text("written by rank 0")
    folder._check_shared(None)
