"""Passwords and tokens appear in no log or record, whoever repeats them.

tests/storage/test_location.py tests which addresses are rejected. tests/engine/test_private_runs.py and
test_remote_run.py check the folders of whole runs.
"""

import json
import logging
import sys
from pathlib import Path

import pytest

from data import pack, verify
from pretrain import checkpoints
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


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("s3://me:hunter2@bucket/x", "s3://...@bucket: a URL is written into logs and recipes"),
        ("https://host/x?X-Amz-Signature=hunter2", "it must not contain ? or #"),
        ("ftp://me:hunter2@host/x", "ftp://...@host/x: ftp:// is not supported"),
        ("hf://user/name", "hf://user/name: data sets are at hf://datasets/USER/NAME"),
    ],
)
def test_commands_refuse_urls_with_our_advice_and_without_their_secrets(
    url: str, advice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for command in (lambda: pack.main([str(tmp_path), url]), lambda: verify.main([url])):
        assert command() == 1
        captured = capsys.readouterr()
        assert advice in captured.err
        assert captured.err.startswith("error: ")
        assert "hunter2" not in captured.out + captured.err


def test_commands_hide_secrets_where_only_a_folder_can_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A `Path` has made one slash of the two after the scheme."""
    for command in (lambda: pack.main([URL, str(tmp_path / "out")]), lambda: checkpoints.main([URL])):
        assert command() == 1
        captured = capsys.readouterr()
        assert "https:/...@host/model.safetensors" in captured.err
        assert "hunter2" not in captured.out + captured.err
