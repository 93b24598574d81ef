"""Containers whose user has no name, no home or a read-only home."""

import getpass
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.user import ensure_user

ROOT = Path(__file__).parents[2]
NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")
CACHES = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TRITON_HOME")


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No name, no home and no entry in passwd; returns the folder for temporary files."""

    def getpwuid(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", getpwuid)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in (*NAMES, *CACHES, "HOME"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    return tmp_path


def test_user_without_name_and_home_gets_both(nobody: Path):
    ensure_user()
    assert getpass.getuser() == f"uid{os.getuid()}"
    assert Path.home() == nobody / f"lomar-uid{os.getuid()}"
    assert Path.home().stat().st_mode & 0o777 == 0o700
    assert Path(os.environ["XDG_CACHE_HOME"]).is_relative_to(nobody)
    ensure_user()  # as another rank of the node, or a worker, does
    assert len(list(nobody.iterdir())) == 1


def test_read_only_home_is_kept_and_caches_go_elsewhere(nobody: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/proc")  # nobody can write there, not even root
    monkeypatch.setenv("TRITON_HOME", "/fast/triton")
    ensure_user()
    assert Path.home() == Path("/proc")
    assert os.environ["XDG_CONFIG_HOME"] == str(nobody / f"lomar-uid{os.getuid()}" / ".config")
    assert os.environ["TRITON_HOME"] == "/fast/triton"


def test_usable_home_is_left_alone(nobody: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(nobody))
    monkeypatch.setenv("USER", "somebody")
    ensure_user()
    assert (getpass.getuser(), Path.home()) == ("somebody", nobody)
    assert not any(name in os.environ for name in CACHES)
    assert list(nobody.iterdir()) == []


def test_folder_that_others_can_write_to_is_not_used(nobody: Path):
    (nobody / f"lomar-uid{os.getuid()}").mkdir()
    (nobody / f"lomar-uid{os.getuid()}").chmod(0o777)
    ensure_user()
    assert Path.home().name.startswith(f"lomar-uid{os.getuid()}-")
    assert Path.home().stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("package", ["data", "pretrain", "downstream"])
def test_every_package_sets_up_the_user_before_importing_torch(package: str, tmp_path: Path):
    """Runs in a new process: torch looks up the user name as soon as its compiler is imported."""
    environment = {name: value for name, value in os.environ.items() if name not in (*NAMES, *CACHES, "HOME")}
    code = (
        f"import pwd; pwd.getpwuid = dict().__getitem__; import {package}; import getpass, pathlib, sys; "
        "print('torch' in sys.modules, getpass.getuser(), pathlib.Path.home())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    name = f"uid{os.getuid()}"
    assert done.stdout.split() == ["False", name, str(tmp_path / f"lomar-{name}")], done.stderr
