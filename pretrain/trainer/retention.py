"""Decides which checkpoints are kept, always the newest sound one; failing to delete one never fails a save."""

import contextlib
import logging
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain.trainer.checkpoint_layout import ASIDE, DELETED, UNFINISHED, checkpoint_names, checkpoint_step, damage
from pretrain.trainer.config import CheckpointConfig
from pretrain.trainer.durable import remove_folder, rename

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stored:
    """A checkpoint on disk.

    Attributes:
        size: in bytes, of all files in it.
        damage: what is wrong with it, if anything.
    """

    name: str
    step: int
    size: int
    damage: str | None


def stored(folder: Path, read: bool = False) -> list[Stored]:
    """The checkpoints in a folder, latest step first; with `read`, all of their bytes are read to find damage."""
    return [
        Stored(name, checkpoint_step(name) or 0, folder_size(folder / name), damage(folder / name, read))
        for name in checkpoint_names(folder)
    ]


def set_aside(folder: Path) -> list[Path]:
    """Damaged checkpoints that were set aside, earliest step first; they do not count as checkpoints."""
    return sorted(
        path for path in folder.glob(f"{ASIDE}*") if checkpoint_step(path.name.removeprefix(ASIDE)) is not None
    )


def folder_size(folder: Path) -> int:
    """The size in bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def why_kept(
    found: Collection[Stored], newest: Stored, config: CheckpointConfig, other_bytes: int = 0
) -> dict[str, str]:
    """The reason for each checkpoint that is kept, by its name; the others may be deleted.

    Args:
        found: checkpoints, latest step first.
        newest: the sound one of them that the run continues from. Those of later steps are kept, but do not count.
        other_bytes: what else counts towards `checkpoint.max_gb`.
    """
    every, later = config.keep_every_steps, [one for one in found if one.step > newest.step]
    whole = [one for one in found if one.step < newest.step and one.damage is None]
    reasons = {one.name: "from a later step" for one in later}
    reasons |= {one.name: f"one of the last {config.keep_last}" for one in whole[: config.keep_last - 1]}
    reasons |= {one.name: f"a multiple of {every}" for one in whole if every and one.step % every == 0}
    if config.max_gb:
        total = other_bytes + newest.size + sum(one.size for one in found if one.name in reasons)
        for one in sorted(found, key=lambda one: one.step):
            if total > config.max_gb * 1e9 and one.name in reasons:
                total -= one.size
                del reasons[one.name]
    return {newest.name: "the newest sound one", **reasons}


def retain(folder: Path, written: str, damaged: Collection[str], config: CheckpointConfig) -> None:
    """Deletes what need not be kept now that a checkpoint is written; what cannot be deleted is logged.

    Args:
        folder: of all checkpoints.
        written: the name of the new one.
        damaged: those that the run could not continue from; the new one may have the name of one of them.
    """
    try:
        _retain(folder, written, damaged, config)
    except OSError as error:
        _log.warning("old checkpoints could not be checked: %s", error)


def leftovers(folder: Path) -> list[Path]:
    """Folders of half a checkpoint, left by a save or a deletion that was killed, or by a save under way."""
    return [path for path in (folder / UNFINISHED, *folder.glob(f"{DELETED}*")) if path.is_dir()]


def remove_leftovers(folder: Path) -> None:
    """Deletes what no checkpoint needs, when no save is under way; what cannot be deleted is logged."""
    for path in leftovers(folder):
        with _logged(path.name):
            shutil.rmtree(path)


def _retain(folder: Path, written: str, damaged: Collection[str], config: CheckpointConfig) -> None:
    found = stored(folder)
    for one in found:
        if one.name != written and (one.damage or one.name in damaged):
            with _logged(one.name):
                put_aside(folder / one.name)
    found = [one for one in found if (folder / one.name).is_dir()]
    newest = next(one for one in found if one.name == written)
    aside = {path: folder_size(path) for path in set_aside(folder)}
    total = newest.size + sum(aside.values())
    for path, size in aside.items():
        if config.max_gb and total > config.max_gb * 1e9:
            with _logged(path.name):
                shutil.rmtree(path)
                total -= size
    reasons = why_kept(found, newest, config, total - newest.size)
    for one in found:
        if one.name not in reasons:
            with _logged(one.name):
                remove_folder(folder / one.name, folder / f"{DELETED}{one.name}")


def make_way(checkpoint: Path) -> None:
    """Frees the name of a checkpoint for another of the same step: sets it aside if it is damaged, or deletes it."""
    if damage(checkpoint):
        put_aside(checkpoint)
    else:
        remove_folder(checkpoint, checkpoint.with_name(f"{DELETED}{checkpoint.name}"))


def put_aside(checkpoint: Path) -> None:
    """Renames a damaged checkpoint, so that it no longer counts; deletes an earlier one of the same step."""
    aside = checkpoint.with_name(f"{ASIDE}{checkpoint.name}")
    if aside.exists():
        shutil.rmtree(aside)
    rename(checkpoint, aside)
    _log.warning("renamed the damaged checkpoint %s to %s", checkpoint, aside.name)


@contextlib.contextmanager
def _logged(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _log.warning("the old checkpoint %s could not be deleted or renamed: %s", name, error)
