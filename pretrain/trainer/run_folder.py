"""The folder of a run: its layout, its lock, and the record of its environment. See docs/pretraining.md."""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from data.file_lock import lock_now
from data.storage.location import without_secrets
from pretrain.trainer.checkpoint_layout import checkpoint_name
from pretrain.trainer.durable import make_folder, write_durably

SHARED_SECONDS = 10.0  # after which a network file system shows what another node has written
_PACKAGES = (
    "lomar-deepspeed",
    "torch",
    "torchvision",
    "triton",
    "deepspeed",
    "timm",
    "webdataset",
    "numpy",
    "pillow",
    "pillow-heif",
)
_ROOT = Path(__file__).parents[2]
_log = logging.getLogger(__name__)


class RunFolder:
    """Paths of everything in `runs/<name>/`."""

    def __init__(self, root: Path):
        self.root = root
        self.lock = root / ".lock"
        self._locked: tuple[int, int] | None = None  # device and inode of the lock that this process holds
        self.config = root / "config.yaml"
        self.environment = root / "environment.json"
        self.metrics = root / "metrics.jsonl"
        self.evaluation = root / "evaluation.jsonl"
        self.samples = root / "samples.jsonl"
        self.skipped_images = root / "skipped_images.txt"
        self.nonfinite = root / "nonfinite.jsonl"
        self.tensorboard = root / "tensorboard"
        self.checkpoints = root / "checkpoints"
        self.logs = root / "logs"
        self.compiled = root / "compiled"
        self.loss_curve = root / "loss.png"
        self.reconstructions = root / "reconstructions.png"
        self.encoder = root / "encoder.safetensors"
        self.encoder_ema = root / "encoder_ema.safetensors"
        self.model = root / "model.safetensors"
        self.model_ema = root / "model_ema.safetensors"

    def result(self, path: Path, step: int | None) -> Path:
        """Where one of the results above goes; `step`, if the run is not over, becomes part of the name."""
        return path if step is None else path.with_name(f"{path.stem}_{checkpoint_name(step)}{path.suffix}")

    def partial_results(self) -> list[Path]:
        """The files of `result` that a stopped run has left."""
        return sorted(self.root.glob("*_step_*.safetensors"))

    def cache_compiled(self) -> None:
        """Makes torch and Triton keep compiled code here, unless the environment says where, so a requeue starts warm.

        Called before anything is compiled.
        """
        if os.environ.get("TORCHINDUCTOR_CACHE_DIR") == default_cache_dir():
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]  # torch sets it on import, to a folder in the node's /tmp
        for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "torchinductor"), ("TRITON_CACHE_DIR", "triton")):
            os.environ.setdefault(variable, str((self.compiled / name).absolute()))

    @contextlib.contextmanager
    def locked(self, is_main: bool = True, patience: float = 10) -> Iterator[None]:
        """Creates and locks the folder: the kernel releases the lock when this process ends, however it ends.

        Only the main rank does so, for all ranks of a run, which call it together. It waits for up to `patience`
        seconds, since a requeued job may start while the old one's processes are still ending. If the settings are
        refused inside and nothing has been written yet, it removes a folder that it created.

        Raises:
            ValueError: another run is writing to this folder, or a node has a folder of its own; on all ranks.
        """
        if not is_main:
            _agree(None)
            self._check_shared(None)
            yield
            return
        is_new = not self.root.exists()
        make_folder(self.root)
        with self.lock.open("a+") as lock:
            _agree(self._wait_for(lock, patience))
            lock.truncate(0)
            lock.write(described := _describe_process())
            lock.flush()
            os.fsync(lock.fileno())  # for other nodes to see
            self._locked = _identity(os.fstat(lock.fileno()))
            try:
                self._check_shared(described)
                yield
            except ValueError:
                if is_new and self._is_in_place() and self._is_empty():
                    shutil.rmtree(self.root)
                raise

    def _check_shared(self, written: str | None) -> None:
        """Raises ValueError on all ranks if one does not see what the main rank has `written` to its lock file."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        told = [written]
        dist.broadcast_object_list(told)
        deadline = time.monotonic() + SHARED_SECONDS
        while told[0] and not self._has(told[0]) and time.monotonic() < deadline:
            time.sleep(0.1)
        seen = [True] * dist.get_world_size()
        dist.all_gather_object(seen, not told[0] or self._has(told[0]))
        if False in seen:
            raise ValueError(
                f"rank {seen.index(False)} does not see {self.lock}, which rank 0 has written: all nodes must share "
                "the folder that runs= names"
            )

    def _has(self, written: str) -> bool:
        return self.lock.is_file() and self.lock.read_text() == written

    def check_in_place(self) -> None:
        """Called by the main rank before anything is created in the folder.

        Raises:
            ValueError: it is no longer the folder that was locked, and another run may be using its name.
        """
        if self._locked and not self._is_in_place():
            raise ValueError(
                f"{self.root} was moved, deleted or replaced while the run was writing to it: put it back and run the "
                "same command again; it continues from the last checkpoint there"
            )

    def _is_in_place(self) -> bool:
        try:
            return _identity(self.lock.stat()) == self._locked
        except FileNotFoundError:
            return False

    def _is_empty(self) -> bool:
        return {path.name for path in self.root.iterdir()} <= {self.lock.name, self.logs.name}

    def _wait_for(self, lock: TextIO, patience: float) -> str | None:
        """Waits for the lock; returns why it cannot be had, if so."""
        deadline = time.monotonic() + patience
        while not _try_lock(lock.fileno()):
            lock.seek(0)
            owner = lock.read().strip()
            if time.monotonic() > deadline:
                return (
                    f"another run is writing to {self.root}: run {owner} to save and stop it, then the same "
                    f"command again to continue it; its logs are in {self.logs}. To train something else, choose "
                    f"another name="
                )
            _log.warning("waiting for %s: another run is still writing to it (%s)", self.root, owner)
            time.sleep(5)
        return None

    def write_environment(self, **facts: Any) -> None:
        """Writes environment.json: versions, git state, machine, and what the caller adds."""
        environment = {
            **facts,
            "versions": versions(),
            "git": git_state(),
            "device": device_name(),
            "host": socket.gethostname(),
            "command": sys.argv,
        }
        write_durably(self.environment, without_secrets(json.dumps(environment, indent=2, default=str)) + "\n")


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def file_digest(path: Path | str) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str | None]:
    """Versions of Python, CUDA and the packages that matter."""
    packages = {name: package_version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **packages, "cuda": torch.version.cuda}


def device_name() -> str:
    """The model of this rank's GPU, or of the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"


def git_state() -> str:
    """'<commit>', '<commit> with changes', or 'not a git checkout'."""
    if not (_ROOT / ".git").exists():  # an installed wheel may lie in a checkout of something else
        return "not a git checkout"
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty= with changes"],
            cwd=_ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"
    return described.stdout.strip()


def package_version(package: str) -> str:
    """The installed version, or 'not installed'."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _describe_process() -> str:
    """The command that stops this run, and where and since when it runs, for whoever wants the folder."""
    job = os.environ.get("SLURM_JOB_ID")
    stop = f"scancel {job}" if job else f"kill {os.getpid()}"
    return f"`{stop}` on {socket.gethostname()} (process {os.getpid()}, since {time.strftime('%F %T')})"


def _agree(problem: str | None) -> None:
    """Raises ValueError on all ranks if the main rank has a problem."""
    found = [problem]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if found[0]:
        raise ValueError(found[0])


def _try_lock(descriptor: int) -> bool:
    try:
        no_locks = lock_now(descriptor)
    except BlockingIOError:
        return False
    if no_locks:
        _log.warning(
            "the run folder's file system has no locks (%s): make sure that no second run writes there", no_locks
        )
    return True
