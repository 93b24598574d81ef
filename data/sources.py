"""The image files to pack, from a folder or a list: sorted, with keys and labels. Opens no image."""

import hashlib
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data.class_list import number_classes, read_classes, same_name
from data.list_file import read_list
from data.names import SHOWN, is_utf_8, readable, shown
from data.scan import ARRAY_EXTENSION, IMAGE_EXTENSIONS, NO_LABEL

# Folders that archives, file managers and file systems leave among images; they are ignored like hidden ones.
SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"})


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
    classes: tuple[str, ...] = ()  # names of the labels
    classes_given: bool = False  # by a file; otherwise they are the class folders, sorted
    ignored: Counter[str] = field(default_factory=Counter)  # what is not packed: kind -> how many
    unsorted: int = 0  # images beside folders of images; if any, no file has a label
    remarks: tuple[str, ...] = ()  # what the user should know about the classes

    def digest(self) -> str:
        """A digest of all files, sizes, modification times and labels."""
        digest = hashlib.blake2b(repr(self.classes).encode(), digest_size=16)
        for file in self.files:
            digest.update(repr(tuple(file)).encode())
        return digest.hexdigest()


def list_source(
    path: str | Path,
    classes_file: Path | None = None,
    labels: bool = True,
    unique_keys: bool = True,
    arrays: bool = False,
) -> Source:
    """Lists a folder of images or a text file of ``path[<TAB>label]`` lines, paths relative to the text file.

    If no image lies directly in a folder, it consists of class folders: the first folder of a file's path is its class,
    and the sorted classes are numbered from 0. Hidden files and folders and those of `SYSTEM_FOLDERS` are ignored.

    Args:
        path: of the folder or list.
        classes_file: names of the classes, one per line, in the order of their labels.
        labels: False leaves all files without labels.
        unique_keys: whether two files with the same key are refused, as shards cannot hold them.
        arrays: whether .npy files in a folder are images, too; a list may name any file.

    Raises:
        ValueError: nothing to pack, files or folders that cannot be read, an invalid line or class, or two
            files with the same key.
    """
    path = Path(path)
    classes = read_classes(classes_file) if classes_file else None
    if path.is_dir():
        source = _from_folder(path, classes, labels, arrays)
    elif path.is_file():
        source = _from_list(path, classes, labels)
    else:
        raise ValueError(f"{path}: no such folder or list file")
    if not source.files:
        raise ValueError(
            f"{path}: no images ({', '.join(IMAGE_EXTENSIONS)}) in it; found {describe_ignored(source.ignored)}"
        )
    by_key: dict[str, str] = {}
    for file in source.files if unique_keys else ():
        other = by_key.setdefault(file.key, file.name)
        if other is not file.name:
            raise ValueError(
                f"{path}: '{readable(other)}' and '{readable(file.name)}' would both get the key '{file.key}': "
                "rename one of them"
            )
    return source


def make_key(name: str) -> str:
    """A WebDataset key from a relative path: without extension, dots and spaces replaced, traceable to the file.

    A key must not hold a dot (the extension would begin there) nor start with two underscores (WebDataset skips those).
    """
    return re.sub(r"^_+", "_", re.sub(r"[^\w/-]", "_", os.path.splitext(readable(name))[0].lstrip("/")))


@dataclass
class _Walk:
    """Collects what is below a folder; follows links, but enters each folder once, so circular links end."""

    bar: tqdm
    extensions: tuple[str, ...]
    images: list[tuple[str, os.stat_result]] = field(default_factory=list)
    top: list[str] = field(default_factory=list)  # folders in the first level
    ignored: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    visited: set[tuple[int, int]] = field(default_factory=set)

    def enter(self, folder: str, prefix: str = "") -> None:
        try:
            stat = os.stat(folder)
            if (stat.st_dev, stat.st_ino) in self.visited:
                return
            self.visited.add((stat.st_dev, stat.st_ino))
            with os.scandir(folder) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except PermissionError:
            self.unreadable.append(prefix or folder)
            return
        for entry in entries:
            hidden = entry.name.startswith(".")
            extension = os.path.splitext(entry.name)[1].lower()
            if entry.is_dir():
                if hidden or entry.name in SYSTEM_FOLDERS:
                    self.ignored[f"folder {readable(entry.name)}"] += 1
                    continue
                if not prefix:
                    self.top.append(entry.name)
                self.enter(entry.path, f"{prefix}{entry.name}/")
            elif extension.lstrip(".") not in self.extensions:
                self.ignored[readable(extension or (entry.name if hidden else "without suffix"))] += 1
            elif hidden:
                self.ignored[f"hidden {extension}"] += 1
            elif not os.access(entry.path, os.R_OK):  # also a broken link
                self.unreadable.append(f"{prefix}{entry.name}")
            elif not entry.is_file():  # a FIFO or a device; reading it may never end
                self.ignored["special file"] += 1
            else:
                self.images.append((f"{prefix}{entry.name}", entry.stat()))
                self.bar.update()


def _from_folder(root: Path, given: tuple[str, ...] | None, labels: bool, arrays: bool) -> Source:
    with tqdm(desc="listing", unit="file", disable=None, delay=2) as bar:
        walk = _Walk(bar, (*IMAGE_EXTENSIONS, ARRAY_EXTENSION) if arrays else IMAGE_EXTENSIONS)
        walk.enter(str(root))
    if walk.unreadable:
        raise ValueError(
            f"{root}: files or folders that cannot be read, for lack of permission or as broken links: "
            f"{shown(walk.unreadable)}; `chmod -R u+rX` grants permission"
        )
    walk.images.sort(key=lambda image: image[0])
    folders = sorted({name.split("/")[0] for name, _ in walk.images if "/" in name})
    unsorted = sum("/" not in name for name, _ in walk.images)
    if given is not None and unsorted:
        raise ValueError(
            f"{root}: images ({unsorted}) are not in a class folder, which --classes requires: move them into class "
            "folders, or give a list with their labels"
        )
    if not labels or unsorted:
        files = tuple(_source_file(name, stat, NO_LABEL) for name, stat in walk.images)
        return Source(root, files, ignored=walk.ignored, unsorted=unsorted if labels and folders else 0)
    classes = given or tuple(readable(name) for name in folders)
    number = number_classes(classes)
    unknown = [name for name in folders if same_name(name) not in number]
    if unknown:
        raise ValueError(f"{root}: folders that are not in --classes: {shown(unknown)}")
    if len({same_name(name) for name in folders}) < len(folders):
        counts = Counter(map(same_name, folders))
        raise ValueError(
            f"{root}: folders whose names differ only in how accents are encoded: "
            f"{shown([name for name in counts if counts[name] > 1])}: rename one of them, or move its images"
        )
    broken = [name for name in folders if "\n" in name or "\r" in name]
    if broken:
        raise ValueError(f"{root}: class names cannot contain line breaks: rename {shown(broken)}")
    files = tuple(_source_file(name, stat, number[same_name(name.split("/")[0])]) for name, stat in walk.images)
    remarks = _remarks(root, walk, folders, given is not None)
    return Source(root, files, classes, given is not None, walk.ignored, remarks=remarks)


def _from_list(path: Path, given: tuple[str, ...] | None, labels: bool) -> Source:
    files = sorted(_source_file(file.name, file.stat, file.label) for file in read_list(path, given, labels))
    return Source(path.parent, tuple(files), given or (), given is not None)


def _source_file(name: str, stat: os.stat_result, label: int) -> SourceFile:
    return SourceFile(name, make_key(name), label, stat.st_size, stat.st_mtime_ns)


def _remarks(root: Path, walk: _Walk, folders: list[str], given: bool) -> tuple[str, ...]:
    remarks = []
    empty = sorted(set(walk.top) - set(folders))
    if empty and not given:
        remarks.append(
            f"folders without images are not classes: {shown(empty)}; --classes FILE, a list of all classes, keeps them"
        )
    escaped = [name for name in folders if not is_utf_8(name)]
    if escaped:
        remarks.append(f"folder names that are not UTF-8 are written like this: {shown(escaped)}")
    nested = next((name for name, _ in walk.images if name.count("/") > 1), None)
    if nested:
        top, inner, _ = readable(nested).split("/", 2)
        remarks.append(
            f"the class of an image is its top-level folder: images in '{top}/{inner}' have class '{top}'; if the "
            f"subfolders are the classes, pack {root / top}"
        )
    if len(folders) == 1 and not given:
        remarks.append(
            f"'{readable(folders[0])}' is the only class; if it is not one, --no-labels leaves its images unlabeled"
        )
    return tuple(remarks)


def describe_ignored(ignored: Counter[str]) -> str:
    """Describes what was not taken for an image, and what to do about it."""
    kinds = [f"{count} {kind}" for kind, count in ignored.most_common(SHOWN)]
    text = ", ".join(kinds) + (f" and {len(ignored) - SHOWN} other kinds" if len(ignored) > SHOWN else "")
    if ".tar" in ignored:
        text += "; shards (*.tar) need no packing: use them as data.shards"
    if f".{ARRAY_EXTENSION}" in ignored:
        text += "; `python -m data.pack FOLDER SHARDS --channels C` treats .npy files as images"
    if ignored.keys() & {".zip", ".tgz", ".gz", ".7z", ".rar"}:
        text += "; unpack archives first"
    if ignored.keys() & {".dng", ".cr2", ".nef", ".arw", ".dcm", ".svg", ".pdf"}:
        text += "; convert other formats to JPEG or PNG first"
    return text or "nothing"
