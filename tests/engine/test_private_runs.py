"""All files of a run have the permissions of the umask, and none contains a secret."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.commands import Command

pytestmark = pytest.mark.engine
UMASK = 0o027
SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "DATABASE_PASSWORD")


def test_run_files_follow_the_umask_and_hold_no_secrets(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in SECRETS:
        monkeypatch.setenv(name, f"hunter2-{name}")
    monkeypatch.setenv("LOMAR_VERBOSE", "1")
    recipe, before = str(write_recipe(tmp_path)), os.umask(UMASK)
    try:
        run = Command([recipe, "checkpoint.every_steps=4"], tmp_path / "said.txt")
    finally:
        os.umask(before)
    output = run.finish()
    assert "hunter2" not in output
    paths = list((tmp_path / "runs").rglob("*"))
    assert {"environment.json", "config.yaml", "rank0.log", "manifest.json"} <= {path.name for path in paths}
    for path in paths:
        expected = (0o777 if path.is_dir() else 0o666) & ~UMASK
        assert path.stat().st_mode & 0o777 == expected, path
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path
