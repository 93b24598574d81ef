"""Training continues while a checkpoint is written, whether or not the write succeeds."""

import errno
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoint_stubs import StubEngine, Training
from safetensors.torch import load_file

from pretrain.trainer import checkpoint_writer
from pretrain.trainer.checkpoint_layout import EMA_FILE, LATEST, TrainState, checkpoint_name, load_deepspeed_file
from pretrain.trainer.ema import EMA, NoEMA

pytestmark = pytest.mark.usefixtures("process_group")


class Blocked:
    """Blocks every write of a torch file until `go` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.go, self.writes = threading.Event(), 0
        self._write = checkpoint_writer.write_torch
        monkeypatch.setattr(checkpoint_writer, "write_torch", self)

    def __call__(self, path: Path, content: Any) -> list[int]:
        self.writes += 1
        assert self.go.wait(30)
        return self._write(path, content)


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", fail)


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path / "checkpoints", keep_last=2)


@pytest.fixture
def saver(training: Training) -> Any:
    from pretrain.trainer.saver import Saver  # imports DeepSpeed

    return Saver(training.checkpoints, is_main=True, saved=0)


def test_checkpoint_has_the_state_at_the_start_of_the_save(
    training: Training, saver: Any, monkeypatch: pytest.MonkeyPatch
):
    """Weights, their average and the run's state change in the meantime, and a second save waits for the first."""
    blocked, engine, state = Blocked(monkeypatch), StubEngine(), TrainState(step=10)
    model = torch.nn.Linear(2, 2)
    ema = EMA(model, [model], 0.9, 0.9, torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saver.save(engine, ema, state, required=False)
    assert saver.metrics().keys() == {"checkpoint_stall_s", "checkpoint_stall_share"}
    assert saver.metrics() == {}, "once"
    with torch.no_grad():
        engine.weights.add_(1)
        model.weight.add_(1)
    state.step = 20
    saver.poll()
    assert training.steps == []
    second = threading.Thread(target=saver.save, args=(engine, NoEMA(), state, False))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert blocked.writes == 1
    blocked.go.set()
    second.join(30)
    saver.close()
    assert training.steps == [10, 20]
    for step, value in ((10, 0.0), (20, 1.0)):
        written = load_deepspeed_file(str(training.folder / checkpoint_name(step) / "weights.pt"))
        assert written["module"]["w"].tolist() == [value] * 9
        assert written["lomar"]["step"] == step
    averaged = load_file(training.folder / checkpoint_name(10) / EMA_FILE)
    assert all(torch.equal(averaged[f"{name}"], tensor) for name, tensor in before.items())


def test_failed_save_is_reported_at_the_next_poll_and_training_continues(
    training: Training, saver: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    training.save(10)
    with monkeypatch.context() as broken:
        full_disk(broken)
        saver.save(StubEngine(), NoEMA(), TrainState(step=20), required=False)
        saver._writer._thread.join()
        saver.poll()
        (message,) = caplog.messages
        assert "checkpoint step_00000020 could not be written" in message
        assert "No space left on device; training continues" in message
        assert training.steps == [10]
        with pytest.raises(OSError, match=r"step_00000020 could not .* mend that and .* continues from step 0"):
            saver.save(StubEngine(), NoEMA(), TrainState(step=20), required=True)
    saver.save(StubEngine(), NoEMA(), TrainState(step=30), required=True)
    saver.close()
    assert training.steps == [10, 30]
    assert training.start() == 30


def test_required_save_waits_and_a_finished_one_is_not_repeated(training: Training, saver: Any):
    saver.save(StubEngine(), NoEMA(), TrainState(step=10), required=False)
    saver.save(StubEngine(), NoEMA(), TrainState(step=10), required=True)
    written = (training.folder / checkpoint_name(10)).stat().st_ino
    saver.save(StubEngine(), NoEMA(), TrainState(step=10), required=True)
    assert training.steps == [10]
    assert (training.folder / checkpoint_name(10)).stat().st_ino == written


def test_step_is_saved_again_if_latest_could_not_be_written(training: Training, monkeypatch: pytest.MonkeyPatch):
    training.save(10)
    write = checkpoint_writer.write_durably

    def fail(path: Path, text: str) -> None:
        if path.name == LATEST:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    with monkeypatch.context() as broken:
        broken.setattr(checkpoint_writer, "write_durably", fail)
        assert training.checkpoints.begin(StubEngine(), NoEMA(), TrainState(step=20)).wait()
    assert training.steps == [10, 20], "it is there, and sound"
    training.save(20)
    assert sorted(path.name for path in training.folder.iterdir()) == [LATEST, checkpoint_name(10), checkpoint_name(20)]


def blocked_folder(training: Training) -> None:
    (training.folder / "unfinished").write_text("a file")


def moved_folder(training: Training) -> None:
    training.folder.rename(training.folder.with_name("moved"))
    training.folder = training.folder.with_name("moved")


def no_memory(training: Training) -> None:
    def fail(tree: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory")

    training.checkpoints._copies.copy = fail


def no_words(training: Training) -> None:
    def fail(tree: Any) -> Any:
        raise MemoryError

    training.checkpoints._copies.copy = fail


def unexpected_error(training: Training) -> None:
    training.checkpoints._group = object()  # which the writing thread cannot use


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("break_save", [blocked_folder, moved_folder, no_memory, no_words, unexpected_error])
def test_any_failure_is_returned_as_a_message(break_save: Callable[[Training], None], training: Training):
    training.save(10)
    break_save(training)
    problem = training.checkpoints.begin(StubEngine(), NoEMA(), TrainState(step=20)).wait()
    assert problem
    assert "step_00000020 could not be written" in problem
    assert break_save is not moved_folder or not training.checkpoints.folder.exists(), "it is not made again"
    assert training.steps == [10]
    assert (training.folder / LATEST).read_text() == checkpoint_name(10)


def test_undeletable_old_checkpoint_only_warns(
    training: Training, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    training.save(10, 20)

    def fail(folder: Path, *arguments: Any, **keys: Any) -> None:
        if "deleted" in str(folder):
            raise OSError(errno.EIO, "Input/output error")

    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(shutil, "rmtree", fail)
    training.save(30)
    assert "the old checkpoint step_00000010 could not be deleted or renamed: [Errno 5]" in caplog.text
    assert training.steps == [20, 30]
    monkeypatch.undo()
    training.save(40)
    assert not list(training.folder.glob("deleted_*")), "it is tried again"


def test_copies_reuse_memory_and_keep_shared_tensors_shared():
    from pretrain.trainer.host_copy import HostCopies

    copies, weights = HostCopies(), torch.arange(6.0).view(2, 3)
    tree = {"w": weights, "row": weights[1], "list": [weights.t(), (1, "two")]}
    first = copies.copy(tree)
    copies.wait()
    assert torch.equal(first["w"], weights)
    assert torch.equal(first["list"][0], weights.t())
    assert first["row"].untyped_storage().data_ptr() == first["w"].untyped_storage().data_ptr()
    assert first["w"].data_ptr() != weights.data_ptr()
    address = first["w"].data_ptr()
    second = copies.copy(tree)
    copies.wait()
    assert second["w"].data_ptr() != address, "it is still read"
    copies.release()
    assert copies.copy(tree)["w"].data_ptr() in (address, second["w"].data_ptr())
