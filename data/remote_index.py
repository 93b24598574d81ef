"""The index of shards in a store: next to them, or in this user's cache, with a local copy to map into memory."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import braceexpand

from data.class_list import CLASSES_FILE
from data.file_lock import locked
from data.index_file import (
    Index,
    check_names,
    check_unchanged,
    digest_of,
    is_current,
    read_index,
    write_index,
)
from data.index_scan import scan_shards
from data.shard_files import refuse_compressed, tars_of
from data.shrink import PLAN_FILE
from data.storage.cache import CacheSettings, cache_home
from data.storage.client import NotThereError, Object, StoreError
from data.storage.files import copy_small, list_files, look_up, upload
from data.storage.location import Remote, parse_url

_REQUESTS = 32  # at once, if a store cannot list files


@dataclass(frozen=True)
class RemoteShards:
    """A set of shards in a store, as far as known without an index."""

    url: str
    root: Remote
    is_subset: bool  # of a folder: a tar, or a brace pattern
    names: tuple[str, ...] | None  # sorted, relative to `root`; None: a folder of a store that cannot list files
    files: dict[str, Object] | None  # files directly in `root`, if the store can list them

    @property
    def index(self) -> Remote:
        """The index next to the shards; a subset of a folder has its own."""
        part = f"-{digest_of(chr(10).join(self.names or ()))[:12]}" if self.is_subset else ""
        return self.root / f"index{part}.npz"

    @property
    def folder(self) -> Path:
        """The local folder for copies of small files next to the shards, and for an index that cannot be there."""
        return cache_home() / digest_of(str(self.root))

    def has(self, name: str, timeout: float) -> Object | None:
        """Looks up a file next to the shards; None if there is none."""
        if self.files is not None:
            return self.files.get(name)
        try:
            return look_up(self.root / name, timeout)
        except NotThereError:
            return None

    def objects(self, names: Sequence[str], timeout: float) -> list[Object]:
        """Looks up the shards' sizes and versions; raises StoreError, naming a shard that is not there."""
        if self.files is not None and not any("/" in name for name in names):
            for name in names:
                if name not in self.files:
                    raise NotThereError(f"{self.root / name}: no such shard")
            return [self.files[name] for name in names]
        with ThreadPoolExecutor(_REQUESTS) as pool:
            return list(pool.map(lambda name: look_up(self.root / name, timeout), names))


def find_remote_shards(url: str, timeout: float) -> RemoteShards:
    """Asks a store which shards there are.

    Args:
        url: a folder, a tar, or a brace pattern.
        timeout: as in `request`.

    Raises:
        ValueError: not the URL of a store, credentials in it, or no shards there.
    """
    shards = [parse_url(text) for text in braceexpand.braceexpand(url)]
    if "{" not in url and not url.rstrip("/").lower().endswith(".tar"):
        files = list_files(shards[0], timeout)
        if files is None:
            return RemoteShards(url, shards[0], False, None, None)
        names = tars_of(shards[0], [name for name in files if not name.startswith(".")])
        if not names:
            raise ValueError(
                f"{shards[0]}: no shards (*.tar) in this folder; `python -m data.pack` makes them from images"
            )
        return RemoteShards(url, shards[0], False, tuple(names), files)
    refuse_compressed(shards, len(shards))
    common = os.path.commonpath([f"/{shard.parent.path}" for shard in shards]).strip("/")
    root = Remote(shards[0].scheme, shards[0].authority, common)
    names = sorted({shard.path[len(common) :].strip("/") for shard in shards})
    return RemoteShards(url, root, True, tuple(names), list_files(root, timeout))


def load_remote_index(url: str, cache: CacheSettings) -> Index:
    """Loads the index of shards in a store and compares it with what the store lists; never builds one.

    Raises:
        ValueError: there is none, or shards do not match it; says what to do.
    """
    shards = find_remote_shards(url, cache.timeout)
    index, where = _read(shards, cache)
    if shards.files is None:  # each shard is checked when it is fetched
        return index
    found = shards.objects(index.shards, cache.timeout)
    check_unchanged(index, where, found)
    return replace(index, versions=index.versions or tuple(what.version for what in found))


def read_remote_index(url: str, cache: CacheSettings) -> Index:
    """Like `load_remote_index`, but shards may have changed."""
    return _read(find_remote_shards(url, cache.timeout), cache)[0]


def _read(shards: RemoteShards, cache: CacheSettings) -> tuple[Index, object]:
    path, where = _find(shards, cache.timeout)
    if path is None:
        raise ValueError(
            f"{shards.root}: no index of these shards next to them or in {shards.folder}: make it once with "
            f"`python -m data.index {shards.url}`, which reads every shard"
        )
    index = replace(read_index(path, shards.root), cache=cache)
    if shards.names is not None:
        check_names(index, where, shards.names)
    return index, where


def build_remote_index(url: str, cache: CacheSettings) -> tuple[Index, str]:
    """Reads every shard once, and writes the index next to them, or to a local folder if that is not allowed.

    Returns:
        The index, and where it is.

    Raises:
        ValueError: shards that cannot be used.
    """
    shards = find_remote_shards(url, cache.timeout)
    if shards.names is None:
        raise ValueError(
            f"{shards.root}: this store cannot list files, so it is unclear which shards to index: give a pattern "
            f"such as {shards.root}/train-{{000000..000146}}.tar"
        )
    shards.folder.mkdir(parents=True, exist_ok=True)
    path = shards.folder / shards.index.name
    objects = shards.objects(shards.names, cache.timeout)
    with locked(path):
        for name in (CLASSES_FILE, PLAN_FILE):
            if shards.has(name, cache.timeout):
                copy_small(shards.root / name, shards.folder / name, cache.timeout)
            else:
                (shards.folder / name).unlink(missing_ok=True)
        write_index(scan_shards(shards.root, shards.names, shards.folder, objects, checksums=True), path)
        index = replace(read_index(path, shards.root), cache=cache)
        try:
            upload(path, shards.index, cache.timeout)
        except StoreError as error:
            return index, f"{path}, as it could not be written next to the shards ({error})"
        return index, str(shards.index)


def _find(shards: RemoteShards, timeout: float) -> tuple[Path | None, object]:
    """Finds a copy of the index next to the shards, or the local one; also returns what to call it."""
    published = shards.has(shards.index.name, timeout)
    here = shards.folder / shards.index.name
    if published is None:
        return (here, here) if is_current(here, None) else (None, "")
    # Each version's copy has its own name: a process that has mapped an older one keeps using it.
    copy = here.with_name(f"{here.stem}-{digest_of(f'{published}')[:12]}.npz")
    shards.folder.mkdir(parents=True, exist_ok=True)
    with locked(copy):
        if not copy.exists():
            copy_small(shards.index, copy, timeout)
    return (copy if is_current(copy, None) else None), shards.index
