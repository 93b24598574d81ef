"""How a batch gets from a worker process to the main one: through shared memory, or through a pipe where that fails."""

import contextlib
import io
import logging
import math
import multiprocessing
import os
import pickle
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import util
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing  # makes tensors pickle as shared memory
from torch import Tensor

SHARED_MEMORY = Path("/dev/shm")
# Longest TMPDIR: AF_UNIX takes 107 bytes, of which the folder of the sockets and their names need 32.
MAX_SOCKET_FOLDER = 107 - len("/pymp-xxxxxxxx/listener-xxxxxxxx")
SMALL = 1 << 20  # bytes up to which a pipe is faster: a tensor in shared memory costs the main process a millisecond
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Handover:
    """A result on its way; pickling it again only copies its bytes."""

    pickled: bytes
    problem: str = ""  # why it is not in shared memory; '' if it is
    size: int = 0  # bytes, if it is not

    @cached_property
    def result(self) -> Any:
        """The result, unpickled once, since its shared memory can be handed over only once."""
        return pickle.loads(self.pickled)

    def pin_memory(self) -> "Handover":
        """Copies the result to page-locked memory; DataLoader's pinning thread calls this."""
        pinned = Handover(b"", self.problem, self.size)
        pinned.__dict__["result"] = self.result.pin_memory()
        return pinned


class HandoverPacker:
    """Packs the results of one worker."""

    def __init__(self) -> None:
        self._problem = ""

    def __call__(self, result: object) -> Handover:
        """Packs into shared memory until that fails once; then removes what the failure left behind, and uses pipes."""
        if not self._problem:
            try:
                buffer = io.BytesIO()
                _SharingPickler(buffer, 5).dump(result)
                return Handover(buffer.getvalue())
            except (OSError, RuntimeError) as error:  # torch raises RuntimeError where there is no room
                self._problem = str(error)
                _remove_leftovers()
        buffer = io.BytesIO()
        _PlainPickler(buffer, protocol=5).dump(result)
        return Handover(buffer.getvalue(), self._problem, buffer.tell())


def _as_array(obj: object, largest: float) -> Any:
    """Pickles a tensor of up to `largest` bytes as an array, several times as fast as torch does."""
    if isinstance(obj, Tensor) and obj.nbytes <= largest:
        return torch.from_numpy, (obj.numpy(),)
    return NotImplemented


class _PlainPickler(pickle.Pickler):
    """Puts no tensor into shared memory."""

    def reducer_override(self, obj: object) -> Any:
        return _as_array(obj, math.inf)


class _SharingPickler(ForkingPickler):
    """Puts large tensors into shared memory."""

    def reducer_override(self, obj: object) -> Any:
        return _as_array(obj, SMALL)


def _remove_leftovers() -> None:
    """Removes files of this process that torch could not fill; those it filled have no name any more."""
    with contextlib.suppress(OSError):  # the folder may be missing, or this process may have too many open files
        for path in SHARED_MEMORY.glob(f"torch_{os.getpid()}_*"):
            path.unlink(missing_ok=True)


def warn_of_pipes(problem: str, megabytes: float, workers: int) -> None:
    """Warns that batches go through pipes, and says what helps."""
    free = "is missing"
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(SHARED_MEMORY)
        free = f"has {usage.free / 2**20:.0f} of {usage.total / 2**20:.0f} MiB free"
    _log.warning(
        "batches of %.0f MiB go through pipes, which are slower than shared memory (%s; %s %s): enlarge it with docker "
        "run --shm-size=%dg or --ipc=host, or lower data.num_workers (%d)",
        megabytes,
        problem,
        SHARED_MEMORY,
        free,
        max(1, round(3 * workers * megabytes / 1024 + 0.5)),
        workers,
    )


def shorten_socket_folder() -> None:
    """Chooses a short folder for the sockets of worker processes where TMPDIR is too long for them.

    Call it before they start: they inherit the folder.
    """
    if len(os.fsencode(tempfile.gettempdir())) <= MAX_SOCKET_FOLDER:
        return
    settings: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    if settings.get("tempdir"):
        return
    for parent in ("/tmp", "/var/tmp", str(SHARED_MEMORY)):
        with contextlib.suppress(OSError):  # if none works, batches go through pipes
            settings["tempdir"] = folder = tempfile.mkdtemp(prefix="pymp-", dir=parent)
            util.Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-100)
            return
