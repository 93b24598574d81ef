"""Stubs of a run that only writes and resumes checkpoints, without DeepSpeed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from pretrain.trainer.checkpoint_layout import LATEST, TrainState, checkpoint_name, checkpoint_names, checkpoint_step
from pretrain.trainer.config import CheckpointConfig
from pretrain.trainer.ema import NoEMA
from pretrain.trainer.launch import World


class StubEngine:
    """Saves one file and loads nothing."""

    _config = None
    basic_optimizer = SimpleNamespace(param_groups=[], defaults={})

    checkpoint_engine: Any = None

    def __init__(self) -> None:
        self.weights = torch.zeros(9)

    def save_checkpoint(self, folder: str, tag: str, client_state: dict[str, Any], **_: Any) -> None:
        self.checkpoint_engine.save({"module": {"w": self.weights}, **client_state}, f"{folder}/{tag}/weights.pt")

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict[str, Any]]:
        return f"{folder}/{tag}", {}


class Training:
    """A run that only writes and resumes checkpoints."""

    def __init__(self, folder: Path, keep_last: int, keep_every: int = 0):
        self.folder, self.keys = folder, {"keep_last": keep_last, "keep_every_steps": keep_every}
        self.start()

    def start(self) -> int:
        """Resume as if the command were run again; returns the step from which it continues."""
        from pretrain.trainer.checkpoint import Checkpoints  # imports DeepSpeed

        self.checkpoints = Checkpoints(self.folder, World(0, 1, 0), CheckpointConfig(**self.keys))
        state, _ = self.checkpoints.resume(StubEngine(), NoEMA(), TrainState())
        return state.step

    def save(self, *steps: int) -> None:
        for step in steps:
            assert self.checkpoints.begin(StubEngine(), NoEMA(), TrainState(step=step)).wait() is None
            latest = (self.folder / LATEST).read_text()
            assert latest == checkpoint_name(step), "the newest in time"
            assert (self.folder / latest / "weights.pt").is_file()
            assert checkpoint_name(step) in checkpoint_names(self.folder)

    def damage(self, step: int, cut_off: bool = False) -> None:
        path = self.folder / checkpoint_name(step) / "weights.pt"
        path.write_bytes(b"cut off" if cut_off else path.read_bytes()[::-1])

    @property
    def steps(self) -> list[int]:
        return [checkpoint_step(name) or 0 for name in reversed(checkpoint_names(self.folder))]
