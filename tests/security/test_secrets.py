"""Passwords and tokens appear in no log or record, whoever repeats them.

tests/storage/test_location.py tests which addresses are rejected. tests/engine/test_private_runs.py and
test_remote_run.py check the folders of whole runs.
"""

import json
import logging
import sys
from pathlib import Path

import pytest

from pretrain.trainer.launch import World
from pretrain.trainer.logs import log_to_console, log_to_file
from pretrain.trainer.run_folder import RunFolder

URL = "https://me:hunter2@host/model.safetensors?X-Amz-Signature=hunter2"


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hunter2-key")


def test_messages_and_tracebacks_hide_secrets(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    world = World(0, 1, 0)
    log_to_console(world)
    log_to_file(tmp_path, world)
    try:
        raise OSError(f"GET {URL} failed, with the key hunter2-key")
    except OSError as error:
        logging.getLogger("pretrain").error("error: %s", error, exc_info=True)
    captured = capsys.readouterr()
    for text in (captured.err, (tmp_path / "rank0.log").read_text()):
        assert "GET https://...@host/model.safetensors?... failed, with the key ..." in text
        assert "Traceback" in text
        assert "hunter2" not in text


def test_run_record_hides_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The record contains the whole command line."""
    monkeypatch.setattr(sys, "argv", ["run.py", "quickstart", f"start.checkpoint={URL}"])
    folder = RunFolder(tmp_path)
    folder.write_environment(start={"file": URL})
    written = folder.environment.read_text()
    assert "hunter2" not in written
    assert json.loads(written)["command"][2] == "start.checkpoint=https://...@host/model.safetensors?..."
