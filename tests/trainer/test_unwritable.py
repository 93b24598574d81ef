"""Training continues when its output pipe is closed or the disk for its metrics and lists is full."""

import json
import logging
import os
import sys
from pathlib import Path

import pytest

from data.batch import Skipped
from pretrain.trainer.append import append
from pretrain.trainer.launch import exit_process
from pretrain.trainer.loggers import JsonLines, Loggers, MetricLogger, Values
from pretrain.trainer.metrics import read_metrics
from pretrain.trainer.run_folder import RunFolder
from pretrain.trainer.skipped_images import SkippedImages

FULL = Path("/dev/full")  # every write fails with ENOSPC


def test_full_disk_warns_once_and_logging_recovers(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = RunFolder(tmp_path)
    loggers = Loggers([JsonLines(folder, start=0)])
    loggers.log_metrics({"step": 1, "loss": 0.5})
    folder.metrics.rename(tmp_path / "kept")
    folder.metrics.symlink_to(FULL)
    for step in (2, 3):
        loggers.log_metrics({"step": step, "loss": 0.5})
    (message,) = caplog.messages
    assert (
        f"{folder.metrics} cannot be written: [Errno 28] No space left on device; training continues, but lines"
        in message
    )
    folder.metrics.unlink()
    (tmp_path / "kept").rename(folder.metrics)
    with folder.metrics.open("a") as file:
        file.write('{"step": 3, "lo')  # a line cut off by the full disk
    loggers.log_metrics({"step": 4, "loss": 0.25})
    assert [row["step"] for row in read_metrics(folder.metrics)] == [1, 4]


def test_skipped_images_are_counted_even_if_their_list_is_unwritable(caplog: pytest.LogCaptureFixture):
    skipped = SkippedImages(FULL, 2, 100)
    assert skipped.add([Skipped("a", "empty", "an empty file")] * 2, 8) == 2
    with pytest.raises(ValueError, match="3 of 16 images"):
        skipped.add([Skipped("b", "empty", "an empty file")], 8)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("garbage", [b"\x00\xff\xfe" * 100, b"[1, 2]\n5\nnull\n", b'{"loss": 1}\n', b"\n\n"])
def test_garbage_in_a_metrics_file_is_ignored(garbage: bytes, tmp_path: Path):
    folder = RunFolder(tmp_path)
    lines = [json.dumps({"step": step}).encode() + b"\n" for step in (1, 2, 3)]
    folder.metrics.write_bytes(lines[0] + lines[1] + garbage + b"\n" + lines[2])
    assert [row["step"] for row in read_metrics(folder.metrics)] == [1, 2, 3]
    JsonLines(folder, start=2)
    assert folder.metrics.read_bytes() == lines[0] + lines[1]


class Broken(MetricLogger):
    """Writes to a closed pipe."""

    def log_metrics(self, values: Values) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    log_evaluation = log_metrics

    def close(self) -> None:
        raise BrokenPipeError(32, "Broken pipe")


def test_failing_logger_warns_once_and_the_others_continue(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    folder = RunFolder(tmp_path)
    loggers = Loggers([Broken(), JsonLines(folder, start=0)])
    for step in (1, 2):
        loggers.log_metrics({"step": step})
        loggers.step()
    loggers.close()
    assert [row["step"] for row in read_metrics(folder.metrics)] == [1, 2]
    assert len(caplog.messages) == 1
    assert "Broken cannot write: [Errno 32] Broken pipe; training continues" in caplog.messages[0]


def test_exit_code_is_kept_when_the_output_pipe_is_closed(monkeypatch: pytest.MonkeyPatch):
    """As after `| tee` was killed: the buffered output can no longer be flushed."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    read, write = os.pipe()
    os.close(read)
    with monkeypatch.context() as patched:
        stream = os.fdopen(write, "w")
        patched.setattr(sys, "stdout", stream)
        print("x")
        exit_process(3)
    assert codes == [3]
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_append_adds_lines(tmp_path: Path):
    append(tmp_path / "list", "a\n")
    append(tmp_path / "list", "b\n")
    assert (tmp_path / "list").read_text() == "a\nb\n"
