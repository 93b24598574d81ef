"""A lock on a file that several processes may write."""

import errno
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.waiting import POLL, look_while_waiting

# What a file system without locks answers: a network file system that does not support them, Lustre without -o flock,
# or an NFS server whose lock daemon is missing.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
TIMEOUT = 3600.0  # seconds to wait for another process; the headers of a million shards take less


class NotWritableError(Exception):
    """The folder is read-only."""


def lock_now(descriptor: int) -> OSError | None:
    """Locks an open file until it is closed; returns what a file system without locks answers, which locks nothing.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: any other failure.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return error
    return None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file next to ``path``; the kernel releases the lock when its holder dies, for whatever reason.

    Raises:
        NotWritableError: the folder is read-only.
        TimeoutError: another process has held the lock for `TIMEOUT` seconds.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise NotWritableError from error
        raise
    try:
        try:
            # Without locks, two processes may build the same index, and both are correct.
            lock_now(descriptor)
        except BlockingIOError:
            print(f"waiting for another process that is writing {path}", file=sys.stderr)
            _wait_for(descriptor, lock)
        yield
        # The index is published before its lock is removed: whoever waits for the lock, or makes a new one, sees it.
        if path.exists():
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, lock: Path) -> None:
    """Polls for the lock: the process that holds it may hang, and signals must be noticed."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            lock_now(descriptor)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"another process has held {lock} for {TIMEOUT / 60:.0f} minutes: end it, and start again"
                ) from None
        look_while_waiting()
        time.sleep(POLL)
