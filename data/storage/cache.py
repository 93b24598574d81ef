"""A folder of this node with shards of stores: whole, of bounded size, shared by all processes, and safe to kill.

A shard in it is complete: it is written as ``.NAME.part`` and renamed to ``NAME`` when it is whole. Everything else is
expressed by locks (`flock`), which the kernel releases when a process dies:

- the process that writes a part holds a lock on it, so the others wait; a part without a lock is a leftover;
- processes that need a shard share a lock on it, so it is not deleted to make room;
- a process that makes room locks the folder for a moment. A part has its final size from the start.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.storage.client import Object, StoreError
from data.storage.fetch import DEFAULT_TIMEOUT, STALLED, download
from data.storage.location import Remote

DEFAULT_GB = 100.0
POLL = 0.1  # seconds between two checks of what other processes do
_FULL = (errno.ENOSPC, errno.EDQUOT)
_log = logging.getLogger(__name__)


def cache_home() -> Path:
    """``$XDG_CACHE_HOME/lomar-deepspeed``, ``~/.cache`` by default, for indexes of shards, and shards."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "lomar-deepspeed"
    if cache.is_absolute():
        return cache
    # No home: a user without an entry in /etc/passwd, as in containers.
    return Path(tempfile.gettempdir()) / f"lomar-deepspeed-{os.getuid()}"


@dataclass(frozen=True)
class CacheSettings:
    """Where shards of stores are kept, and how long to wait for them."""

    folder: str = ""  # '': the job's own folder on a cluster ($SLURM_TMPDIR), else below `cache_home`
    gigabytes: float = DEFAULT_GB
    timeout: float = DEFAULT_TIMEOUT  # seconds without data

    @property
    def path(self) -> Path:
        """The folder."""
        if self.folder:
            return Path(self.folder).expanduser()
        job = os.environ.get("SLURM_TMPDIR")
        return Path(job) / "lomar-deepspeed-shards" if job else cache_home() / "shards"

    @property
    def limit(self) -> int:
        """Bytes that the folder may hold."""
        return round(self.gigabytes * 1e9)


class ShardCache:
    """The folder as one process uses it; picklable."""

    def __init__(self, settings: CacheSettings) -> None:
        """Does not touch the folder."""
        self.settings, self.folder = settings, settings.path

    def path(self, remote: Remote, what: Object) -> Path:
        """Where a shard is once it has been fetched."""
        digest = hashlib.blake2b(f"{remote}\n{what.size}\n{what.version}".encode("utf-8", "surrogateescape"))
        return self.folder / f"{remote.name.rpartition('.')[0][:80]}-{digest.hexdigest()[:24]}.tar"

    def pin(
        self,
        remote: Remote,
        what: Object,
        stopped: Callable[[], bool] = lambda: False,
        urgent: Callable[[], bool] = lambda: True,
    ) -> int | None:
        """Fetches a shard unless it is there or another process fetches it, and keeps it from being deleted.

        Args:
            remote: the shard.
            what: its size and version.
            stopped: polled; if it is true, this returns None.
            urgent: whether the shard is needed now; otherwise this waits for room as long as it takes.

        Returns:
            A descriptor of it, for `unpin`.

        Raises:
            StoreError: the shard cannot be fetched, or there is no room for it; names it.
        """
        path = self.path(remote, what)
        self._make_folder()
        while not stopped():
            descriptor = _lock(path, fcntl.LOCK_SH, os.O_RDONLY)
            if descriptor is not None:
                if os.fstat(descriptor).st_size == what.size:
                    os.utime(descriptor)  # when it was needed last
                    return descriptor
                path.unlink(missing_ok=True)  # not written by us
                unpin(descriptor)
            elif not self._fetch(remote, what, path, stopped, urgent):
                time.sleep(POLL)
        return None

    def _fetch(
        self, remote: Remote, what: Object, path: Path, stopped: Callable[[], bool], urgent: Callable[[], bool]
    ) -> bool:
        """Downloads a shard; returns false if another process is already doing so."""
        part = path.with_name(f".{path.name}.part")
        descriptor = _lock(part, fcntl.LOCK_EX, os.O_RDWR | os.O_CREAT)
        if descriptor is None:
            return False
        try:
            if path.exists():  # fetched meanwhile
                part.unlink()
                return True
            self._reserve(remote, what.size, descriptor, stopped, urgent)
            position = 0
            for chunk in download(remote, what, self.settings.timeout):
                if stopped():
                    part.unlink()
                    return True
                position = _write(descriptor, chunk, position)
            if position != what.size:  # the part has the final size from the start, so nobody would notice later
                raise StoreError(f"{remote}: {position} bytes arrived instead of {what.size}")
            os.fsync(descriptor)
            os.replace(part, path)
        except BaseException as error:
            part.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in _FULL:
                raise StoreError(
                    f"{self.folder}: the disk or quota is full while fetching {remote}: set data.cache_gb to "
                    f"less than {self.settings.gigabytes:g}, or data.cache_dir to a folder with more room"
                ) from None
            raise
        finally:
            unpin(descriptor)
        return True

    def _reserve(
        self, remote: Remote, size: int, descriptor: int, stopped: Callable[[], bool], urgent: Callable[[], bool]
    ) -> None:
        """Waits for room, then makes the part as long as the shard will be."""
        start, said = time.monotonic(), STALLED
        while not stopped():
            with self._locked_folder():
                os.ftruncate(descriptor, 0)
                if self._make_room(size):
                    os.ftruncate(descriptor, size)
                    return
            if not urgent():
                start = time.monotonic()
            waited = time.monotonic() - start
            if waited > self.settings.timeout:
                raise StoreError(
                    f"{remote}: no room for its {size / 1e9:.3g} GB in {self.folder}: running processes need all of "
                    f"data.cache_gb={self.settings.gigabytes:g}; raise it, or give this run another data.cache_dir"
                )
            if waited >= said:
                _log.warning("%s: has been waiting for room in %s for %.0f seconds", remote, self.folder, waited)
                said *= 2
            time.sleep(POLL)

    def _make_room(self, size: int) -> bool:
        """Deletes leftovers and the least recently used shards until `size` bytes fit; false if they do not."""
        shards, used = [], 0
        for entry in os.scandir(self.folder):
            if not entry.name.endswith((".tar", ".tar.part")):
                continue
            with contextlib.suppress(FileNotFoundError):
                stat = entry.stat()
                if entry.name.endswith(".part") and _delete_unlocked(Path(entry.path)):
                    continue
                used += stat.st_size
                if entry.name.endswith(".tar"):
                    shards.append((stat.st_mtime, entry.path, stat.st_size))
        for _, path, length in sorted(shards):
            if used + size <= self.settings.limit:
                break
            if _delete_unlocked(Path(path)):
                used -= length
        return used + size <= self.settings.limit

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"{self.folder}: cannot create this folder for shards ({error.strerror}): set data.cache_dir to another"
            ) from None

    @contextlib.contextmanager
    def _locked_folder(self) -> Iterator[None]:
        while (descriptor := _lock(self.folder / ".lock", fcntl.LOCK_EX, os.O_RDWR | os.O_CREAT)) is None:
            time.sleep(POLL / 10)
        try:
            yield
        finally:
            unpin(descriptor)


def unpin(descriptor: int) -> None:
    """Closes a descriptor from `ShardCache.pin`; then the shard may be deleted when room is needed."""
    with _fork_lock:
        _held.discard(descriptor)
        os.close(descriptor)


def _write(descriptor: int, chunk: bytes, position: int) -> int:
    """Writes all of a chunk at a position, and returns the position after it.

    A nearly full disk takes only the first bytes; the next call then raises, unless there is room again.
    """
    left = memoryview(chunk)
    while left:
        written = os.pwrite(descriptor, left, position)
        position, left = position + written, left[written:]
    return position


def _lock(path: Path, how: int, flags: int) -> int | None:
    """Opens and locks a file; None if it is missing, deleted meanwhile, or locked elsewhere."""
    with _fork_lock:
        try:
            descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            return None
        except PermissionError as error:
            raise StoreError(f"{path}: {error.strerror}: set data.cache_dir to a folder of your own") from None
        _held.add(descriptor)
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        unpin(descriptor)
        raise StoreError(
            f"{path.parent}: cannot lock files there ({error.strerror}): set data.cache_dir to a folder on a disk "
            f"of this node"
        ) from None
    unpin(descriptor)
    return None


def _delete_unlocked(path: Path) -> bool:
    """Deletes a file unless it is locked or gone; returns whether it did."""
    descriptor = _lock(path, fcntl.LOCK_EX, os.O_RDWR)
    if descriptor is None:
        return False
    path.unlink()
    unpin(descriptor)
    return True


# A lock belongs to all copies of its descriptor: a forked data worker's copies would keep it forever.
_held: set[int] = set()
_fork_lock = threading.RLock()


def _close_in_child() -> None:
    while _held:
        os.close(_held.pop())
    _fork_lock.release()


os.register_at_fork(before=_fork_lock.acquire, after_in_parent=_fork_lock.release, after_in_child=_close_in_child)
