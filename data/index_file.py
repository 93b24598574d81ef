"""The index of shards, which locates every sample: one ``.npz`` file, mapped into memory."""

import hashlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.keys import Keys
from data.mapped_arrays import map_arrays
from data.messages import one_or_list
from data.multi_labels import MultiLabels
from data.storage.cache import CacheSettings
from data.storage.client import Object
from data.storage.location import Location, Remote

FORMAT = 2
HOW_TO_REINDEX = "if the shards are correct, run `python -m data.verify SHARDS --reindex`"
_ARRAYS = ("shard_bytes", "shard_sizes", "offset", "length", "label")


@dataclass(frozen=True, eq=False)
class Index:
    """Every sample of a set of shards; N samples in S shards, ordered by shard name and byte."""

    root: Location  # `shards` are relative to this folder
    shards: tuple[str, ...]  # S names, sorted
    shard_bytes: np.ndarray  # int64 (S,)
    shard_sizes: np.ndarray  # int64 (S,), samples per shard
    offset: np.ndarray  # int64 (N,), first byte of the image in its shard
    length: np.ndarray  # int64 (N,), bytes of the image
    label: np.ndarray  # int32 (N,), NO_LABEL = none
    multi_labels: MultiLabels | None  # lists of labels of N samples, if they have them
    label_problem: str  # about the first sample whose label is invalid; '' if there is none
    keys: Keys  # N WebDataset keys
    classes: tuple[str, ...]  # names of the labels, from classes.txt; may be empty
    fingerprint: str  # digest of shard names, sizes, offsets, lengths and labels; not of the folder
    checksum: np.ndarray | None = None  # uint32 (N,), CRC-32 of the image; None if only tar headers were read
    shrunk: str = ""  # how photographs were shrunk when packed
    file: Path | None = None  # where the arrays are mapped from
    versions: tuple[str, ...] = ()  # of shards in a store: S, '' where it gives none
    cache: CacheSettings = field(default_factory=CacheSettings)  # for shards in a store

    def __len__(self) -> int:
        return len(self.offset)

    @cached_property
    def shard_ends(self) -> np.ndarray:
        """Int64 (S,), the first sample after each shard."""
        return np.cumsum(self.shard_sizes)

    def shard_of(self, sample: int) -> int:
        """The shard that a sample is in."""
        return int(np.searchsorted(self.shard_ends, sample, side="right"))

    @property
    def is_remote(self) -> bool:
        """Whether the shards are in a store."""
        return isinstance(self.root, Remote)

    def stored(self, shard: int) -> tuple[Remote, Object]:
        """Returns where a shard is in its store, with its size and version."""
        assert isinstance(self.root, Remote)
        version = self.versions[shard] if self.versions else ""
        return self.root / self.shards[shard], Object(int(self.shard_bytes[shard]), version)

    def __reduce__(self) -> tuple[Any, ...]:
        """Lets a process that receives the index map it as well; no array is copied."""
        assert self.file is not None, "an index that is not written yet stays in its process"
        return _map_again, (self.file, self.root, self.fingerprint, self.versions, self.cache)


def is_current(path: Path, classes: tuple[str, ...] | None) -> bool:
    """Whether there is an index of this version at `path`, made with these classes, if they are known.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return False
    try:
        with np.load(path, allow_pickle=False) as stored:
            same_classes = classes is None or tuple(map(str, stored["classes"])) == classes
            return int(stored["format"]) == FORMAT and same_classes
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: not a readable index ({error}); delete it, and it is rebuilt")


def read_index(path: Path, root: Location) -> Index:
    """Maps an index file into memory, without looking at the shards.

    Raises:
        ValueError: it is damaged.
    """
    try:
        fields = map_arrays(path)
        arrays: dict[str, Any] = {name: fields[name] for name in _ARRAYS}
        has_lists = "multi_label_ends" in fields
        return Index(
            root,
            shards=tuple(str(name) for name in fields["shards"]),
            multi_labels=MultiLabels(fields["multi_labels"], fields["multi_label_ends"]) if has_lists else None,
            label_problem=str(fields["label_problem"]),
            keys=Keys(fields["key_text"], fields["key_ends"]),
            classes=tuple(str(name) for name in fields["classes"]),
            fingerprint=str(fields["fingerprint"]),
            shrunk=str(fields.get("shrunk", "")),
            versions=tuple(str(version) for version in fields.get("versions", ())),
            checksum=fields.get("checksum"),
            file=path,
            **arrays,
        )
    except Exception as error:  # zipfile, NumPy, KeyError: a damaged file may raise anything
        raise _unreadable(path, error) from error


def _map_again(path: Path, root: Location, fingerprint: str, versions: tuple[str, ...], cache: CacheSettings) -> Index:
    index = read_index(path, root)
    if index.fingerprint != fingerprint:
        raise ValueError(f"{path}: the index was rebuilt while in use: run the command again")
    return replace(index, versions=versions, cache=cache)


def check_names(index: Index, path: object, names: tuple[str, ...]) -> None:
    """Raises ValueError if shards were added or removed; names all of them."""
    problems = [
        f"{index.root / name}: the shard is {'not in' if name in names else 'missing, but is in'} the index {path}: "
        f"{HOW_TO_REINDEX}"
        for name in sorted(set(names) ^ set(index.shards))
    ]
    if problems:
        raise ValueError(one_or_list(problems, "{n} shards were added or removed:"))


def check_unchanged(index: Index, path: object, found: Sequence[Object]) -> None:
    """Raises ValueError if the size or version of shards differs from the index; names all of them."""
    problems = []
    for number, (name, now) in enumerate(zip(index.shards, found, strict=True)):
        size, version = int(index.shard_bytes[number]), index.versions[number] if index.versions else ""
        if now.size != size:
            problems.append(f"{index.root / name}: {now.size} bytes, but the index {path} says {size}")
        elif version and now.version and now.version != version:
            problems.append(f"{index.root / name}: version {now.version}, but the index {path} says {version}")
    if problems:
        problems = [f"{problem}: {HOW_TO_REINDEX}" for problem in problems]
        raise ValueError(one_or_list(problems, "{n} shards have changed:"))


def write_index(index: Index, path: Path) -> None:
    """Writes the file under another name first, so that a reader sees a complete index or none."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    multi = index.multi_labels
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    if multi is not None:
        arrays |= {"multi_labels": multi.classes, "multi_label_ends": multi.ends}
    if index.checksum is not None:
        arrays["checksum"] = index.checksum
    with open(temporary, "wb") as file:
        np.savez(
            file,
            format=np.array(FORMAT),
            shards=np.array(index.shards),
            classes=np.array(index.classes, dtype=str),
            fingerprint=np.array(index.fingerprint),
            key_text=index.keys.text,
            key_ends=index.keys.ends,
            label_problem=np.array(index.label_problem),
            shrunk=np.array(index.shrunk),
            versions=np.array(index.versions, dtype=str),
            **arrays,
        )
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def digest_of(text: str) -> str:
    """The digest of a text, for use in file names."""
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
