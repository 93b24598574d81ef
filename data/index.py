"""The index of shards, where every sample lies: built once from tar headers, kept as one ``.npz`` next to them."""

import errno
import fcntl
import hashlib
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import braceexpand
import numpy as np
from tqdm import tqdm

from data.names import read_lines
from data.scan import ShardContent, scan_shard

FORMAT = 1
CLASSES_FILE = "classes.txt"
HOW_TO_REINDEX = "if the shards are as they should be, run `python -m data.verify SHARDS --reindex`"
SCAN_THREADS = 8  # the work is mostly waiting for storage, and threads start much faster than processes


class Keys(Sequence[str]):
    """The keys of all samples as one block of UTF-8: millions of Python strings would take gigabytes."""

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        self.text = text  # uint8 (bytes of all keys,)
        self.ends = ends  # int64 (samples,), where in `text` each key ends

    @classmethod
    def of(cls, keys: Sequence[str]) -> "Keys":
        """Packs strings."""
        encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
        return cls(np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([len(key) for key in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, sample: int) -> str:  # type: ignore[override]  # slices are not supported
        sample = range(len(self))[sample]
        start = int(self.ends[sample - 1]) if sample else 0
        return self.text[start : int(self.ends[sample])].tobytes().decode("utf-8", "surrogateescape")


@dataclass(frozen=True, eq=False)
class Index:
    """Every sample of a set of shards; N samples in S shards, in the order of shard names and bytes."""

    root: Path  # `shards` are relative to this folder
    shards: tuple[str, ...]  # S names, sorted
    shard_bytes: np.ndarray  # int64 (S,)
    shard_sizes: np.ndarray  # int64 (S,), samples per shard
    shard: np.ndarray  # int32 (N,), index of the shard
    offset: np.ndarray  # int64 (N,), first byte of the image in its shard
    length: np.ndarray  # int64 (N,), bytes of the image
    label: np.ndarray  # int32 (N,), -1 = none
    keys: Keys  # N WebDataset keys
    classes: tuple[str, ...]  # names of the labels, from classes.txt; may be empty
    fingerprint: str  # digest of shard names, sizes, offsets, lengths and labels; independent of the folder

    def __len__(self) -> int:
        return len(self.offset)


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
        if path.exists():
            return _checked(read_index(path, root), path, names)
    return build_index(shards)


def build_index(shards: str | Path) -> Index:
    """Builds and publishes the index, or loads one that another process publishes meanwhile; raises as `load_index`."""
    root, names = find_shards(shards)
    for path in index_paths(shards):
        with suppress(_NotWritableError), _lock(path):
            if not path.exists():
                _publish(_scan(root, names), path)
            return _checked(read_index(path, root), path, names)
    raise ValueError(
        f"no index can be written, neither in {root} nor in the cache: set XDG_CACHE_HOME to a writable folder"
    )


def find_shards(shards: str | Path) -> tuple[Path, tuple[str, ...]]:
    """The folder of a set of shards, absolute, and their sorted names relative to it.

    Raises:
        ValueError: there are none.
    """
    text = str(shards)
    if "{" in text:
        paths = [Path(os.path.abspath(name)) for name in braceexpand.braceexpand(text)]
    elif Path(text).is_dir():
        paths = [path.absolute() for path in Path(text).glob("*.tar")]
    else:
        paths = [Path(os.path.abspath(text))]
    if not paths:
        raise ValueError(f"{text}: no shards (*.tar) in this folder; `python -m data.pack` makes them from images")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"{missing[0]}: no such shard ({len(missing)} of {len(paths)} missing); give a folder of *.tar"
        )
    root = Path(os.path.commonpath([path.parent for path in paths]))
    return root, tuple(sorted({path.relative_to(root).as_posix() for path in paths}))


def index_paths(shards: str | Path) -> tuple[Path, Path]:
    """Possible paths of the index of a set of shards: next to them, or in the cache if their folder is read-only."""
    root, names = find_shards(shards)
    # A subset of a folder has its own index, which must not be mistaken for the index of the whole folder.
    part = "" if Path(shards).is_dir() else "-" + _digest("\n".join(names))[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lomar-deepspeed"
    return root / f"index{part}.npz", cache / f"{_digest(str(root))}" / f"index{part}.npz"


def read_index(path: Path, root: Path) -> Index:
    """Reads an index file without looking at the shards.

    Raises:
        ValueError: it is incomplete or has another format.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            fields = {name: stored[name] for name in stored.files}
        if int(fields["format"]) != FORMAT:
            raise ValueError(f"format {fields['format']}")
        keys = Keys(fields["key_text"], fields["key_ends"])
        arrays = {name: fields[name] for name in ("shard_bytes", "shard_sizes", "offset", "length", "label")}
        shard = np.repeat(np.arange(len(arrays["shard_sizes"]), dtype=np.int32), arrays["shard_sizes"])
        names = tuple(str(name) for name in fields["shards"])
        classes = tuple(str(name) for name in fields["classes"])
        return Index(
            root, names, shard=shard, keys=keys, classes=classes, fingerprint=str(fields["fingerprint"]), **arrays
        )
    except Exception as error:  # zipfile, zlib, NumPy, KeyError: a damaged file may raise anything
        raise ValueError(f"{path}: not a readable index ({error}); delete it and it is built again") from error


def _checked(index: Index, path: Path, names: tuple[str, ...]) -> Index:
    """Refuses an index if shards were added or removed or changed size: one stat per shard."""
    for name in sorted(set(names) ^ set(index.shards)):
        what = "is not in the index" if name in names else "is in the index but gone"
        raise ValueError(f"{index.root / name}: the shard {what} {path}: {HOW_TO_REINDEX}")
    for name, recorded in zip(index.shards, index.shard_bytes, strict=True):
        size = os.stat(index.root / name).st_size
        if size != recorded:
            raise ValueError(
                f"{index.root / name}: {size} bytes, but the index {path} says {recorded}: {HOW_TO_REINDEX}"
            )
    return index


def _scan(root: Path, names: tuple[str, ...]) -> Index:
    paths = [root / name for name in names]
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        try:
            contents = list(
                tqdm(pool.map(scan_shard, paths), "indexing", len(paths), unit="shard", disable=None, delay=1)
            )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # do not read a thousand shards after one was refused
            raise
    shard_bytes = np.array([path.stat().st_size for path in paths], np.int64)
    return _index(root, names, shard_bytes, contents)


def _index(root: Path, names: tuple[str, ...], shard_bytes: np.ndarray, contents: list[ShardContent]) -> Index:
    sizes = np.array([len(content.offset) for content in contents], np.int64)
    offset, length, label = (
        np.concatenate([getattr(content, name) for content in contents]) for name in ("offset", "length", "label")
    )
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=16)
    for array in (shard_bytes, sizes, offset, length, label):
        digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
    classes_file = root / CLASSES_FILE
    return Index(
        root=root,
        shards=names,
        shard_bytes=shard_bytes,
        shard_sizes=sizes,
        shard=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        offset=offset,
        length=length,
        label=label,
        keys=Keys.of([key for content in contents for key in content.keys]),
        classes=tuple(read_lines(classes_file)) if classes_file.exists() else (),
        fingerprint=digest.hexdigest(),
    )


def _publish(index: Index, path: Path) -> None:
    """Writes the file under another name first: a reader sees a complete index or none."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.savez(
            file,
            format=np.array(FORMAT),
            shards=np.array(index.shards),
            classes=np.array(index.classes, dtype=str),
            fingerprint=np.array(index.fingerprint),
            key_text=index.keys.text,
            key_ends=index.keys.ends,
            **{name: getattr(index, name) for name in ("shard_bytes", "shard_sizes", "offset", "length", "label")},
        )
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class _NotWritableError(Exception):
    pass


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds a lock file next to ``path``; the kernel releases the lock when its holder dies, for whatever reason.

    Raises:
        _NotWritableError: the folder is read-only.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise _NotWritableError from error
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


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
