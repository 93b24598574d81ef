"""A lock on a file that several processes may write."""

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class NotWritableError(Exception):
    """The folder is read-only."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file next to ``path``; the kernel releases the lock when its holder dies, for whatever reason.

    Raises:
        NotWritableError: the folder is read-only.
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
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that writes {path}", file=sys.stderr)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: two processes may build the same index, and both results are right
        yield
        # A process that waits for this file, or creates a new one, finds the index published before it is removed.
        if path.exists():
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
