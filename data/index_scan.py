"""Builds the index of shards by reading all their tar headers and, for checksums, their images."""

import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.class_list import number_classes, read_classes_of_shards
from data.index_file import Index
from data.keys import Keys
from data.messages import one_or_list
from data.multi_labels import MultiLabels
from data.scan import ShardContent, describe_unused, scan_shard
from data.shard_files import tars_below
from data.shrink import read_shrink
from data.storage.client import Object
from data.storage.files import look_up
from data.storage.location import Location, Remote
from data.waiting import look_while_waiting

SCAN_THREADS = 8  # the work is mostly waiting for storage, and threads start much faster than processes


def scan_shards(
    root: Location,
    names: tuple[str, ...],
    beside: Path,
    objects: Sequence[Object] | None = None,
    *,
    checksums: bool = False,
) -> Index:
    """Reads all shards and returns their index.

    Args:
        root: where they are.
        names: the shards, sorted, relative to it.
        beside: a local folder with the files that may be next to shards, `classes.txt` and `pack.json`.
        objects: sizes and versions of shards in a store.
        checksums: also read the images, for `Index.checksum`.

    Raises:
        ValueError: shards that cannot be used; names all of them.
    """
    classes = read_classes_of_shards(beside)
    numbers = number_classes(classes)
    known = objects or [look_up(root / name) for name in names]

    def scan(name: str, what: Object) -> ShardContent | str:
        try:
            return scan_shard(root / name, numbers, what, checksums)
        except (ValueError, OSError) as error:
            return str(error)

    scanned: list[ShardContent | str] = []
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        try:
            results = pool.map(scan, names, known)
            for content in tqdm(results, "indexing", len(names), unit="shard", disable=None, delay=1):
                scanned.append(content)
                look_while_waiting()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C need not wait for a thousand shards
            raise
    problems = [content for content in scanned if isinstance(content, str)]
    if problems:
        raise ValueError(one_or_list(problems, f"{{n}} of {len(names)} shards cannot be used:"))
    contents = [content for content in scanned if isinstance(content, ShardContent)]
    unused = sum((content.unused for content in contents), Counter[str]())
    if unused:
        print(f"{root}: unused members of the shards: {describe_unused(unused)}", file=sys.stderr)
    if isinstance(root, Path) and (below := tars_below(root, names)):
        print(f"{root}: {below} tars in its subfolders are not part of these shards", file=sys.stderr)
    index = _index(root, names, np.array([what.size for what in known], np.int64), contents)
    return replace(
        index,
        classes=classes,
        shrunk=str(read_shrink(beside) or ""),
        versions=tuple(what.version for what in known) if isinstance(root, Remote) else (),
        checksum=_joined([content.checksum for content in contents]),
    )


def _index(root: Location, names: tuple[str, ...], shard_bytes: np.ndarray, contents: list[ShardContent]) -> Index:
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
        classes=(),
        fingerprint=digest.hexdigest(),
    )


def _joined(parts: list[np.ndarray | None]) -> np.ndarray | None:
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if len(known) == len(parts) else None


def _problem_of_lists(keys: Keys, label: np.ndarray, has_list: np.ndarray) -> str:
    """Explains that some samples have a list of labels and others do not; '' if all or none have one."""
    if has_list.all() or not has_list.any():
        return ""
    other, listed = keys[int(has_list.argmin())], keys[int(has_list.argmax())]
    lists, others = int(has_list.sum()), int((~has_list).sum())
    what = "a single label or none" if label[~has_list].max() >= 0 else "none"
    return (
        f"{lists} samples, such as '{listed}', have a list of labels, and {others}, such as '{other}', have {what}: "
        f"give every sample `labels` in its .json, an empty list if it has no class"
    )
