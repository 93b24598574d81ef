"""The image files to pack, from a folder or a list: sorted, with keys and labels. Opens no image."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data.scan import IMAGE_EXTENSIONS, NO_LABEL


class SourceFile(NamedTuple):
    """One file to pack."""

    name: str  # relative to the source's root
    key: str  # of its sample in the shards
    label: int  # NO_LABEL = none
    size: int  # bytes
    mtime: int  # nanoseconds


@dataclass(frozen=True)
class Source:
    """Everything to pack, in the order of the shards."""

    root: Path
    files: tuple[SourceFile, ...]
    classes: tuple[str, ...]  # sorted names of the class folders; empty for flat folders and lists
    ignored: dict[str, int]  # files without an image's extension: extension -> count

    def digest(self) -> str:
        """A digest of all files, sizes, modification times and labels."""
        digest = hashlib.blake2b(repr(self.classes).encode(), digest_size=16)
        for file in self.files:
            digest.update(repr(tuple(file)).encode())
        return digest.hexdigest()


def list_source(path: str | Path) -> Source:
    """Lists a folder of images or a text file of ``path[<TAB>label]`` lines, paths relative to the text file.

    If no image lies directly in a folder, it consists of class folders: the first folder of a file's path is its class,
    and the sorted classes are numbered from 0.

    Raises:
        ValueError: nothing to pack, a line that cannot be read, or two files with the same key.
    """
    path = Path(path)
    if path.is_dir():
        source = _from_folder(path)
    elif path.is_file():
        source = _from_list(path)
    else:
        raise ValueError(f"{path}: no such folder or list file")
    if not source.files:
        found = ", ".join(f"{count} {extension}" for extension, count in source.ignored.items()) or "nothing"
        raise ValueError(f"{path}: no images ({', '.join(IMAGE_EXTENSIONS)}) in it; found {found}")
    by_key: dict[str, str] = {}
    for file in source.files:
        other = by_key.setdefault(file.key, file.name)
        if other is not file.name:
            raise ValueError(
                f"{path}: '{other}' and '{file.name}' would both get the key '{file.key}': rename one of them"
            )
    return source


def make_key(name: str) -> str:
    """A WebDataset key from a relative path: without extension, dots and spaces replaced, traceable to the file.

    A key must not hold a dot (the extension would begin there) nor start with two underscores (WebDataset skips those).
    """
    return re.sub(r"^_+", "_", re.sub(r"[^\w/-]", "_", os.path.splitext(name)[0].lstrip("/")))


def _from_folder(root: Path) -> Source:
    entries, ignored = [], Counter[str]()
    for name, entry in _walk(root, set()):
        extension = os.path.splitext(name)[1].lower()
        if extension.lstrip(".") in IMAGE_EXTENSIONS:
            entries.append((name, entry.stat()))
        else:
            ignored[extension or os.path.basename(name)] += 1
    entries.sort(key=lambda entry: entry[0])
    flat = any("/" not in name for name, _ in entries)
    classes = [] if flat else sorted({name.split("/")[0] for name, _ in entries})
    number = {name: label for label, name in enumerate(classes)}
    files = tuple(
        SourceFile(name, make_key(name), number.get(name.split("/")[0], NO_LABEL), stat.st_size, stat.st_mtime_ns)
        for name, stat in entries
    )
    return Source(root, files, tuple(classes), dict(ignored))


def _walk(root: Path, visited: set[tuple[int, int]], prefix: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Every file below ``root``. Follows links to folders but enters each folder once, so circular links end."""
    stat = os.stat(root)
    if (stat.st_dev, stat.st_ino) in visited:
        return
    visited.add((stat.st_dev, stat.st_ino))
    with os.scandir(root) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir():
                yield from _walk(Path(entry.path), visited, f"{prefix}{entry.name}/")
            else:
                yield f"{prefix}{entry.name}", entry


def _from_list(path: Path) -> Source:
    files = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        name, _, label = line.partition("\t")
        if not name.strip():
            continue
        try:
            stat = os.stat(path.parent / name)
        except OSError as error:
            raise ValueError(f"{path}, line {number}: '{name}': {error.strerror}") from error
        if label and not label.strip().isdecimal():
            raise ValueError(f"{path}, line {number}: the label '{label}' is not a number from 0 on")
        files.append(SourceFile(name, make_key(name), int(label or NO_LABEL), stat.st_size, stat.st_mtime_ns))
    return Source(path.parent, tuple(sorted(files)), (), {})
