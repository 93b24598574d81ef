"""The index of shards, where every sample lies: built once from tar headers, kept as one ``.npz`` next to them."""

import hashlib
import os
import socket
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.class_list import number_classes, read_classes_of_shards
from data.file_lock import NotWritableError, locked
from data.keys import Keys
from data.mapped_arrays import map_arrays
from data.messages import one_or_list
from data.multi_labels import MultiLabels
from data.scan import ShardContent, describe_unused, scan_shard
from data.shard_files import find_shards, tars_below
from data.shrink import read_shrink

FORMAT = 2
HOW_TO_REINDEX = "if the shards are as they should be, run `python -m data.verify SHARDS --reindex`"
_ARRAYS = ("shard_bytes", "shard_sizes", "offset", "length", "label")
SCAN_THREADS = 8  # the work is mostly waiting for storage, and threads start much faster than processes


@dataclass(frozen=True, eq=False)
class Index:
    """Every sample of a set of shards; N samples in S shards, in the order of shard names and bytes."""

    root: Path  # `shards` are relative to this folder
    shards: tuple[str, ...]  # S names, sorted
    shard_bytes: np.ndarray  # int64 (S,)
    shard_sizes: np.ndarray  # int64 (S,), samples per shard
    offset: np.ndarray  # int64 (N,), first byte of the image in its shard
    length: np.ndarray  # int64 (N,), bytes of the image
    label: np.ndarray  # int32 (N,), NO_LABEL = none
    multi_labels: MultiLabels | None  # where samples have lists of labels, of N samples
    label_problem: str  # of the first sample whose label means nothing; '' if there is none
    keys: Keys  # N WebDataset keys
    classes: tuple[str, ...]  # names of the labels, from classes.txt; may be empty
    fingerprint: str  # digest of shard names, sizes, offsets, lengths and labels; not of the folder
    shrunk: str = ""  # how photographs were made smaller as they were packed
    file: Path | None = None  # where the arrays are mapped from

    def __len__(self) -> int:
        return len(self.offset)

    @cached_property
    def shard_ends(self) -> np.ndarray:
        """Int64 (S,), the first sample behind each shard."""
        return np.cumsum(self.shard_sizes)

    def shard_of(self, sample: int) -> int:
        """The shard that a sample is in."""
        return int(np.searchsorted(self.shard_ends, sample, side="right"))

    def __reduce__(self) -> tuple[Any, ...]:
        """A process that gets the index maps it as well, and no array is copied."""
        assert self.file is not None, "an index that is not written yet stays in its process"
        return _map_again, (self.file, self.root, self.fingerprint)


def load_index(shards: str | Path) -> Index:
    """Loads the index of a set of shards; builds it on first use.

    Safe to call from many processes at once: one builds, the others wait. If the shards' folder is read-only the index
    goes to ``$XDG_CACHE_HOME/lomar-deepspeed`` (``~/.cache`` by default).

    Args:
        shards: a folder of ``*.tar``, one tar, or a brace pattern such as ``/x/train-{000000..000099}.tar``.

    Raises:
        ValueError: no shards, or shards that are not usable or no longer match the index; the message says which and
            what to do.
    """
    root, names = find_shards(shards)
    for path in index_paths(shards):
        if is_current(path, root):
            return _checked(read_index(path, root), path, names)
    return build_index(shards)


def build_index(shards: str | Path) -> Index:
    """Builds and publishes the index, or loads one that another process publishes meanwhile; raises as `load_index`."""
    root, names = find_shards(shards)
    for path in index_paths(shards):
        with suppress(NotWritableError), locked(path):
            if not is_current(path, root):
                _publish(_scan(root, names), path)
            return _checked(read_index(path, root), path, names)
    raise ValueError(
        f"no index can be written, neither in {root} nor in the cache: set XDG_CACHE_HOME to a writable folder"
    )


def index_paths(shards: str | Path) -> tuple[Path, Path]:
    """Possible paths of the index of a set of shards: next to them, or in the cache if their folder is read-only."""
    root, names = find_shards(shards)
    # A subset of a folder has its own index, which must not be mistaken for the index of the whole folder.
    part = "" if Path(shards).expanduser().is_dir() else "-" + _digest("\n".join(names))[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "lomar-deepspeed"
    if not cache.is_absolute():  # no home: a user without an entry in /etc/passwd, as in containers
        cache = Path(tempfile.gettempdir()) / f"lomar-deepspeed-{os.getuid()}"
    return root / f"index{part}.npz", cache / f"{_digest(str(root))}" / f"index{part}.npz"


def is_current(path: Path, root: Path) -> bool:
    """Whether there is an index of this version at `path`, made with the list of classes that there is now.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return False
    try:
        with np.load(path, allow_pickle=False) as stored:
            return int(stored["format"]) == FORMAT and tuple(map(str, stored["classes"])) == read_classes_of_shards(
                root
            )
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: not a readable index ({error}); delete it and it is built again")


def read_index(path: Path, root: Path) -> Index:
    """Maps an index file into memory, without looking at the shards.

    Raises:
        ValueError: it is damaged.
    """
    try:
        fields = map_arrays(path)
        arrays = {name: fields[name] for name in _ARRAYS}
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
            file=path,
            **arrays,
        )
    except Exception as error:  # zipfile, NumPy, KeyError: a damaged file may raise anything
        raise _unreadable(path, error) from error


def _map_again(path: Path, root: Path, fingerprint: str) -> Index:
    index = read_index(path, root)
    if index.fingerprint != fingerprint:
        raise ValueError(f"{path}: the index was made anew while it was used: start the command again")
    return index


def check_names(index: Index, path: Path, names: tuple[str, ...]) -> None:
    """Raises ValueError if shards were added or removed; names all of them."""
    problems = [
        f"{index.root / name}: the shard "
        f"{'is not in the index' if name in names else 'is in the index but gone'} {path}: {HOW_TO_REINDEX}"
        for name in sorted(set(names) ^ set(index.shards))
    ]
    if problems:
        raise ValueError(one_or_list(problems, "{n} shards were added or removed:"))


def _checked(index: Index, path: Path, names: tuple[str, ...]) -> Index:
    """Refuses an index if shards were added or removed or changed size: one stat per shard."""
    check_names(index, path, names)
    sizes = [os.stat(index.root / name).st_size for name in index.shards]
    problems = [
        f"{index.root / name}: {size} bytes, but the index {path} says {recorded}: {HOW_TO_REINDEX}"
        for name, size, recorded in zip(index.shards, sizes, index.shard_bytes.tolist(), strict=True)
        if size != recorded
    ]
    if problems:
        raise ValueError(one_or_list(problems, "{n} shards have changed:"))
    return index


def _scan(root: Path, names: tuple[str, ...]) -> Index:
    classes = read_classes_of_shards(root)
    numbers = number_classes(classes)

    def scan(name: str) -> ShardContent | str:
        try:
            return scan_shard(root / name, numbers)
        except (ValueError, OSError) as error:
            return str(error)

    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        try:
            scanned = list(tqdm(pool.map(scan, names), "indexing", len(names), unit="shard", disable=None, delay=1))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C need not wait for a thousand shards
            raise
    problems = [content for content in scanned if isinstance(content, str)]
    if problems:
        raise ValueError(one_or_list(problems, f"{{n}} of {len(names)} shards cannot be used:"))
    contents = [content for content in scanned if isinstance(content, ShardContent)]
    unused = sum((content.unused for content in contents), Counter[str]())
    if unused:
        print(f"{root}: members of the shards that are not used: {describe_unused(unused)}", file=sys.stderr)
    if below := tars_below(root, names):
        print(f"{root}: {below} tars in the folders below it are not part of these shards", file=sys.stderr)
    shard_bytes = np.array([os.stat(root / name).st_size for name in names], np.int64)
    return _index(root, names, shard_bytes, contents, classes)


def _index(
    root: Path, names: tuple[str, ...], shard_bytes: np.ndarray, contents: list[ShardContent], classes: tuple[str, ...]
) -> Index:
    sizes = np.array([len(content.offset) for content in contents], np.int64)
    offset, length, label, has_list = (
        np.concatenate([getattr(content, name) for content in contents])
        for name in ("offset", "length", "label", "has_list")
    )
    keys = Keys.of([key for content in contents for key in content.keys])
    multi_labels = MultiLabels.join([content.multi_labels for content in contents]) if has_list.any() else None
    digest = hashlib.blake2b("\n".join(names).encode("utf-8", "surrogateescape"), digest_size=16)
    for array in (shard_bytes, sizes, offset, length, label):
        digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
    if multi_labels is not None:
        for array in (multi_labels.classes, multi_labels.ends):
            digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
    problems = [content.label_problem for content in contents if content.label_problem]
    return Index(
        root=root,
        shards=names,
        shard_bytes=shard_bytes,
        shard_sizes=sizes,
        offset=offset,
        length=length,
        label=label,
        multi_labels=multi_labels,
        label_problem=problems[0] if problems else _problem_of_lists(keys, label, has_list),
        keys=keys,
        classes=classes,
        fingerprint=digest.hexdigest(),
        shrunk=str(read_shrink(root) or ""),
    )


def _problem_of_lists(keys: Keys, label: np.ndarray, has_list: np.ndarray) -> str:
    """Why it is not true of all samples that they have a list of labels, or of none; '' if it is."""
    if has_list.all() or not has_list.any():
        return ""
    other, listed = keys[int(has_list.argmin())], keys[int(has_list.argmax())]
    lists, others = int(has_list.sum()), int((~has_list).sum())
    what = "a single label or none" if label[~has_list].max() >= 0 else "none"
    return (
        f"{lists} samples have a list of labels, such as '{listed}', and {others} have {what}, such as '{other}': give "
        f"all of them `labels` in their .json, an empty list where there is no class"
    )


def _publish(index: Index, path: Path) -> None:
    """Writes the file under another name first: a reader sees a complete index or none."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    multi = index.multi_labels
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    if multi is not None:
        arrays |= {"multi_labels": multi.classes, "multi_label_ends": multi.ends}
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
            **arrays,
        )
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
