"""Tests for the end of a run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain import finish
from pretrain.config import load
from pretrain.trainer.ema import NoEMA
from pretrain.trainer.launch import World
from pretrain.trainer.run_folder import RunFolder


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), torch.OutOfMemoryError("out of memory")])
def test_run_finishes_with_a_warning_if_figures_cannot_be_drawn(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(finish, "gather_state_dict", lambda engine, world: {})
    monkeypatch.setattr(finish, "encoder_state_dict", lambda method, state: {"w": torch.ones(2)})
    monkeypatch.setattr(finish, "draw_loss", fail)
    config, module = load("quickstart", ["data.shards=unused"]), SimpleNamespace(module=None)
    run: Any = SimpleNamespace(
        config=config,
        folder=RunFolder(tmp_path),
        world=World(0, 1, 0),
        engine=module,
        ema=NoEMA(),
        epoch=60.0,
        total_steps=9,
        state=SimpleNamespace(step=9),
    )
    no_index: Any = None
    finish.finish(run, no_index)
    assert (tmp_path / "encoder.safetensors").is_file()
    assert f"the figures could not be drawn: {error}" in caplog.text
