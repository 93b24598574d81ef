"""Loads a checkpoint on another number of ranks, through DeepSpeed's universal format."""

import subprocess
import sys
from pathlib import Path
from typing import Any


def convert(checkpoint: Path, universal: Path) -> str | None:
    """Converts a ZeRO-1 or ZeRO-2 checkpoint to a universal one; returns the problem in words, or None."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    # DeepSpeed's converter wants a description of tensor parallelism that only Megatron's checkpoints have.
    arguments = ["--input_folder", str(checkpoint), "--output_folder", str(universal), "--inject_missing_state"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    return f"it cannot be converted: {done.stderr.strip()[-2000:]}" if done.returncode else None


def load_universal(engine: Any, folder: Path, name: str) -> None:
    """Loads weights and optimizer state of a universal checkpoint into an engine of any number of ranks."""
    engine._config.load_universal_checkpoint = True
    try:
        path, _ = engine.load_checkpoint(str(folder), tag=name)
    finally:
        engine._config.load_universal_checkpoint = False
    assert path is not None, f"DeepSpeed did not load {folder / name}"
