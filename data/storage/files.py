"""Shards as files, and the small files next to them, wherever they are."""

import os
from pathlib import Path
from typing import BinaryIO, cast

from data.storage.client import NotThereError, Object
from data.storage.fetch import DEFAULT_TIMEOUT, RemoteFile, download, request
from data.storage.location import Location, Remote


def look_up(location: Location, timeout: float = DEFAULT_TIMEOUT) -> Object:
    """Size and version of a file, '' for a local one; raises StoreError, OSError."""
    if isinstance(location, Remote):
        return request(location, lambda store: store.head(location), timeout)
    return Object(os.stat(location).st_size, "")


def open_shard(location: Location, what: Object | None = None) -> BinaryIO:
    """Opens a shard to be read once, from start to end; from a store it is streamed.

    Args:
        location: the shard.
        what: its size and version in a store, if known.
    """
    if isinstance(location, Remote):
        return cast(BinaryIO, RemoteFile(location, what or look_up(location)))
    return open(location, "rb")


def list_files(folder: Remote, timeout: float = DEFAULT_TIMEOUT) -> dict[str, Object] | None:
    """The files directly in a folder of a store, by name; None if it cannot list them, as at https://."""
    return request(folder, lambda store: store.list(folder), timeout)


def copy_small(remote: Remote, path: Path, timeout: float = DEFAULT_TIMEOUT) -> bool:
    """Copies a file to `path`, whole or not at all; if there is none, deletes `path` and returns false."""
    try:
        content = b"".join(download(remote, timeout=timeout))
    except NotThereError:
        path.unlink(missing_ok=True)
        return False
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
    return True


def upload(source: Path | bytes, remote: Remote, timeout: float = DEFAULT_TIMEOUT) -> None:
    """Writes a file into a store, replacing what is there; raises StoreError."""
    request(remote, lambda store: store.write(remote, source), timeout)
