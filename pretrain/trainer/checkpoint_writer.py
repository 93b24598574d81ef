"""Writes a checkpoint in the background, while the step loop goes on.

The threads of all ranks agree over a process group of their own: one operation at a time, in the same order on all
ranks, whatever the training does in its groups meanwhile. Each checkpoint has one thread per rank. The next one begins
after that thread has ended, at the same step on all ranks.
"""

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain.trainer.checkpoint_layout import EMA_FILE, LATEST, MANIFEST, UNFINISHED, TrainState, manifest_text
from pretrain.trainer.config import CheckpointConfig
from pretrain.trainer.deepspeed_files import write_torch
from pretrain.trainer.durable import DurableFile, rename, sync_all, sync_folder, write_durably
from pretrain.trainer.host_copy import HostCopies
from pretrain.trainer.launch import World
from pretrain.trainer.retention import make_way, remove_leftovers, retain
from pretrain.trainer.run_folder import SHARED_SECONDS
from pretrain.trainer.safetensors_file import write_safetensors

_log = logging.getLogger(__name__)


def _make_folder(written: Path) -> None:
    """Makes a folder and its parent, but none above: a run's folder that somebody moves is not to appear again."""
    for folder in (written.parent, written):
        folder.mkdir(exist_ok=True)


def _check_seen(written: Path, files: Mapping[str, list[int]]) -> None:
    """Raises OSError unless the files of all ranks are here: nodes may not share the folder."""
    deadline = time.monotonic() + SHARED_SECONDS
    for name, (size, _) in files.items():
        path = written / name
        while not (path.is_file() and path.stat().st_size == size):
            if time.monotonic() > deadline:
                raise OSError(f"{name}, which another rank has written, is not here: runs= must be shared by all nodes")
            time.sleep(0.1)


class CheckpointWriter:
    """One checkpoint that is being written.

    Args:
        folder: of all checkpoints.
        name: of this one.
        taken: what this rank writes, by file name, in memory that nothing changes.
        state: of the run.
        failure: why this rank could not take the checkpoint, if so.
        damaged: the checkpoints that the run could not continue from; they are set aside when this one is written,
            and no longer listed here.
        group: of the ranks' threads; None if there is one rank.
        copies: their memory is released afterwards.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        taken: Mapping[str, Any],
        state: TrainState,
        failure: str | None,
        *,
        damaged: set[str],
        config: CheckpointConfig,
        world: World,
        group: dist.ProcessGroup | None,
        copies: HostCopies,
    ):
        self._folder, self._name, self._taken, self._manifest_state, self._failure = folder, name, taken, state, failure
        self._damaged, self._config, self._world, self._group, self._copies = damaged, config, world, group, copies
        self._problem: str | None = "an unexpected error"  # unless `_run` gets to its end; its traceback is printed
        self._thread = threading.Thread(target=self._run, name=f"writes {name}", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether it is written or has failed, so that `wait` returns at once."""
        return not self._thread.is_alive()

    def wait(self) -> str | None:
        """Waits until it is written; returns the problem in words if that failed, the same on all ranks."""
        self._thread.join()
        return self._problem and f"checkpoint {self._name} could not be written to {self._folder}: {self._problem}"

    def _run(self) -> None:
        try:
            self._problem = self._write()
        except RuntimeError as error:  # from the process group
            self._problem = f"another rank has ended ({str(error).splitlines()[0]})"
        finally:
            self._taken = {}
            self._copies.release()

    def _write(self) -> str | None:
        """Writes and publishes the checkpoint; returns the problem of the first rank that has one."""
        written = self._folder / UNFINISHED / self._name
        problem = self._agree(self._failure or (self._attempt(self._make, written) if self._world.is_main else None))
        if problem is None:
            files: dict[str, list[int]] = {}
            problem = self._attempt(self._write_files, written, files)
            everywhere = self._gather((problem, files))
            problem = next((problem for problem, _ in everywhere if problem), None)
            if problem is None and self._world.is_main:
                names = {name: numbers for _, part in everywhere for name, numbers in part.items()}
                problem = self._attempt(self._publish, written, names)
            problem = self._agree(problem)
        if problem and self._world.is_main:
            shutil.rmtree(self._folder / UNFINISHED, ignore_errors=True)  # the next save says what it cannot overwrite
        return problem

    def _make(self, written: Path) -> None:
        if written.parent.exists():
            shutil.rmtree(written.parent)
        _make_folder(written)

    def _write_files(self, written: Path, files: dict[str, list[int]]) -> None:
        _make_folder(written)  # another node may not see it yet
        for name, content in self._taken.items():
            if name == EMA_FILE:
                with DurableFile(written / name) as file:
                    write_safetensors(file, content)
                files[name] = [file.size, file.crc]
            else:
                files[name] = write_torch(written / name, content)
        if not self._world.is_main:  # the main rank syncs it with the manifest
            sync_folder(written)

    def _publish(self, written: Path, files: dict[str, list[int]]) -> None:
        # Sync the logs first: a run that continues from here does not repeat their steps.
        for lines in self._folder.parent.glob("*.jsonl"):
            with contextlib.suppress(OSError):  # not worth losing a checkpoint; `append` logs what cannot be written
                sync_all(lines)
        _check_seen(written, files)
        write_durably(written / MANIFEST, manifest_text(self._manifest_state, files))
        final = self._folder / self._name
        if final.exists():  # saved before the run fell back to an older one, or when there was no room for `latest`
            make_way(final)
        rename(written, final)
        write_durably(self._folder / LATEST, self._name)
        retain(self._folder, self._name, self._damaged, self._config)
        self._damaged.clear()
        remove_leftovers(self._folder)

    def _attempt(self, action: Any, *arguments: Any) -> str | None:
        """Returns the problem in words: if this rank alone raised, the others would wait for it."""
        try:
            action(*arguments)
        except OSError as error:
            return str(error)
        except Exception as error:
            _log.exception("while writing checkpoint %s", self._name)
            return f"{type(error).__name__}: {error}"
        return None

    def _agree(self, mine: str | None) -> str | None:
        return next((problem for problem in self._gather(mine) if problem), None)

    def _gather(self, mine: Any) -> list[Any]:
        parts: list[Any] = [None] * self._world.size
        if self._group is None:
            return [mine]
        dist.all_gather_object(parts, mine, group=self._group)
        return parts
