"""Files that survive a power loss: written, synced, and only then given their names.

A file's bytes are safe once it is synced, and its name once the folder is. Everything here goes through functions of
`os`, so that a test can record their order and try what a power loss at each moment would leave behind.
"""

import errno
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

# Errors of file systems that cannot sync a folder, such as some FUSE ones; nothing more can be done there.
_CANNOT = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}


class DurableFile:
    """A new or rewritten file whose size and CRC-32 are known; it is synced when its context ends.

    Attributes:
        size, crc: of what was passed to `write`, so that they also reveal what the disk has lost.
    """

    def __init__(self, path: Path):
        self._path = path
        self._failure: OSError | None = None
        self.size = self.crc = 0

    def __enter__(self) -> "DurableFile":
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        return self

    def write(self, data: Any) -> int:
        """Appends any buffer of bytes; other threads go on meanwhile.

        Raises:
            OSError: the context ends with it, too, even if the caller (torch) turns it into another error.
        """
        view = memoryview(data).cast("B")
        self.crc, written = zlib.crc32(view, self.crc), 0
        try:
            while written < len(view):
                written += os.write(self._descriptor, view[written:])
        except OSError as error:
            self._failure = error
            raise
        self.size += written
        return written

    def flush(self) -> None:
        """Does nothing, since nothing is buffered; torch calls it."""

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
        if self._failure:
            raise self._failure from None


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    finally:
        os.close(descriptor)


def sync_all(path: Path) -> None:
    """Makes a file, or a folder with everything in it, survive a power loss."""
    if path.is_dir():
        for inside in path.iterdir():
            sync_all(inside)
        sync_folder(path)
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Creates a folder and its missing parents."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def write_durably(path: Path, text: str) -> None:
    """Replaces a file: a reader, a crash or a power loss finds either the old content or the new."""
    temporary = path.with_name(path.name + ".tmp")
    with DurableFile(temporary) as file:
        file.write(text.encode())
    rename(temporary, path)


def rename(source: Path, target: Path) -> None:
    """Renames a file over another one, or a folder to a name that is free or an empty folder's."""
    os.replace(source, target)
    sync_folder(target.parent)


def remove_folder(folder: Path, meanwhile: Path) -> None:
    """Renames a folder to `meanwhile` and deletes it, so that its name never stands for half of it.

    Raises:
        OSError: some of it could not be deleted.
    """
    os.replace(folder, meanwhile)
    shutil.rmtree(meanwhile)
