"""Checkpoint engines through which DeepSpeed writes and reads its files, in place of its own."""

from pathlib import Path
from typing import Any, cast

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from pretrain.trainer.checkpoint_layout import load_deepspeed_file
from pretrain.trainer.durable import DurableFile
from pretrain.trainer.host_copy import HostCopies


def write_torch(path: Path, content: Any) -> list[int]:
    """Writes a file with torch.save and syncs it; returns its size and CRC-32. Raises OSError."""
    with DurableFile(path) as file:
        torch.save(content, cast(Any, file))  # torch calls only its `write` and `flush`
    return [file.size, file.crc]


class SafeCheckpointEngine(TorchCheckpointEngine):
    """Writes and reads files immediately.

    A failed write must not raise on this rank while the others wait in DeepSpeed's barriers: it is kept in `failure`,
    for the ranks to agree on. Only tensors, plain values and `deepspeed_types` are unpickled.
    """

    failure: Exception | None = None

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        try:
            write_torch(Path(path), state_dict)
        except OSError as error:
            self.failure = error

    def load(self, path: str, map_location: Any = None) -> Any:
        return load_deepspeed_file(path, map_location)


class TakingEngine(SafeCheckpointEngine):
    """Writes nothing: copies what DeepSpeed wants to save to host memory, into `taken`, by file name."""

    def __init__(self, config: Any, copies: HostCopies):
        super().__init__(config)
        self._copies = copies
        self.taken: dict[str, Any] = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Does nothing: `CheckpointWriter` makes the folder, where ranks agree on a failure."""

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        try:
            self.taken[Path(path).name] = self._copies.copy(state_dict)
        except (MemoryError, RuntimeError) as error:  # RuntimeError: no memory could be pinned
            self.failure = error
