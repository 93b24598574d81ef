"""Finds checkpoints in mmengine's layout, and reads them without running code from a file."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader, get_torch_safe_globals

from downstream.checkpoints.pickles import read_pickle
from downstream.dense.mmengine.strategy import WEIGHTS


def last_checkpoint(work_dir: str) -> Path | None:
    """The newest checkpoint of a training, a file or ZeRO's folder; None if there is none.

    Raises:
        ValueError: the checkpoint named in the file `last_checkpoint` does not exist.
    """
    named = Path(work_dir) / "last_checkpoint"
    if not named.is_file():
        return None
    path = Path(named.read_text(errors="replace").strip())
    for found in (path, Path(work_dir) / path.name):  # the folder may have been moved
        if found.exists():
            return found
    raise ValueError(
        f"{named} names {path}, which does not exist: restore it, or write another checkpoint's name into the file"
    )


def find_weights(name: str) -> str:
    """The weights file of a checkpoint, which is given as mmengine's file, ZeRO's folder, or the folder of a run.

    Raises:
        ValueError: there is none.
    """
    path: Path | None = Path(name)
    if Path(name).is_dir() and not (Path(name) / WEIGHTS).is_file():
        path = last_checkpoint(name)
    if path is not None and path.is_dir():
        path = path / WEIGHTS
    if path is None or not path.is_file():
        raise ValueError(f"{name} is not a checkpoint: give a .pth file, a checkpoint folder or a run folder")
    return str(path)


def refuse_pickles() -> None:
    """Restricts mmengine to reading tensors, its own log buffers, and what `read_pickle` considers harmless.

    Otherwise it would read a file with anything else a second time, and run the code in it.
    """
    CheckpointLoader.register_scheme(prefixes="", loader=_read, force=True)


def _getattr_of_buffer(owner: Any, name: str) -> Any:
    """`getattr`, restricted to what the pickles of mmengine's log buffers need."""
    if owner is not HistoryBuffer or name.startswith("_"):
        raise UnpicklingError(f"GLOBAL getattr({owner!r}, {name!r})")
    return getattr(owner, name)


def _read(filename: str, map_location: Any = None) -> Any:
    allowed = [kind for kind in get_torch_safe_globals() if kind is not getattr]
    allowed.append((_getattr_of_buffer, "builtins.getattr"))
    # No mmap: a lazily read file could be overwritten in the meantime.
    return read_pickle(Path(filename), allowed, map_location=map_location, mmap=False)
