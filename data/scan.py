"""Reads the headers of one tar shard: its samples and the positions of their bytes."""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

IMAGE_EXTENSIONS = ("jpg", "jpeg", "jfif", "png", "webp", "bmp", "tif", "tiff", "gif", "jp2")
NO_LABEL = -1
MAX_LABEL_BYTES = 32

# WebDataset's grammar: the key is the path up to the first dot of the base name, the rest is the (lower-cased)
# extension.
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
# What WebDataset skips: top-level names such as __index__ and everything below such folders.
_SKIPPED = re.compile(r"__[^/]*__($|/)")
# Names of files about the whole data set, found in some shards; any other sample without an image is an error.
_ABOUT_THE_DATASET = frozenset(
    {"readme", "license", "classes", "labels", "dataset", "dataset_info", "metadata", "info"}
)


@dataclass(frozen=True, eq=False)
class ShardContent:
    """The samples of one shard, in the order of their bytes; n samples."""

    keys: tuple[str, ...]
    offset: np.ndarray  # int64 (n,), first byte of the image in the shard
    length: np.ndarray  # int64 (n,), bytes of the image
    label: np.ndarray  # int32 (n,), NO_LABEL where there is none


@dataclass
class _Sample:
    key: str
    start: int
    suffixes: set[str] = field(default_factory=set)
    images: list[tuple[str, int, int]] = field(default_factory=list)  # suffix, offset, length
    label: int = NO_LABEL


def split_name(name: str) -> tuple[str, str] | None:
    """The (key, extension) of a tar member as WebDataset groups them, or None for a member that it does not group."""
    match = _NAME.match(name)
    if match is None or _SKIPPED.match(name):
        return None
    return match.group(1), match.group(2).lower()


def scan_shard(path: Path) -> ShardContent:
    """Lists the samples of a shard from its tar headers, seeking over the data.

    Raises:
        ValueError: the file is not a complete, uncompressed tar, or its samples are not usable; says where and what to
            do.
    """
    with open(path, "rb") as file:
        samples = list(_samples(path, file))
    if not samples:
        raise ValueError(f"{path}: an empty shard, no sample in it; delete the file or write it again")
    images = [_image_of(path, sample) for sample in samples]
    return ShardContent(
        keys=tuple(sample.key for sample in samples),
        offset=np.array([offset for _, offset, _ in images], np.int64),
        length=np.array([length for _, _, length in images], np.int64),
        label=np.array([sample.label for sample in samples], np.int32),
    )


def _samples(path: Path, file: BinaryIO) -> Iterator[_Sample]:
    keys: set[str] = set()
    current: _Sample | None = None
    for member in _members(path, file):
        name = split_name(member.name)
        if name is None or not member.isreg():
            continue
        key, suffix = name
        if current is None or key != current.key:
            if current is not None and _is_a_sample(current):
                yield current
            if key in keys:
                raise ValueError(
                    f"{path}: duplicate key '{key}' at byte {member.offset}; a key may occur once in a shard and its "
                    "members must be adjacent: write the shard again"
                )
            keys.add(key)
            current = _Sample(key, member.offset)
        if suffix in current.suffixes:
            raise ValueError(
                f"{path}: duplicate key '{key}', two members '{member.name}', the second at byte {member.offset}"
            )
        current.suffixes.add(suffix)
        if suffix.rpartition(".")[2] in IMAGE_EXTENSIONS:
            current.images.append((suffix, member.offset_data, member.size))
        elif suffix == "cls" and member.size <= MAX_LABEL_BYTES:
            file.seek(member.offset_data)
            current.label = _label(file.read(member.size))
    if current is not None and _is_a_sample(current):
        yield current


def _members(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Every tar member. Does not use ``TarFile.next``, which takes a broken header in mid-file for the end."""
    size = file.seek(0, 2)
    offset = 0
    try:
        file.seek(0)
        tar = tarfile.TarFile(fileobj=file)
        while True:
            file.seek(offset)
            member = tarfile.TarInfo.fromtarfile(tar)
            end = member.offset_data + (member.size if member.isreg() else 0)
            if end > size:
                raise ValueError(
                    f"{path}: truncated, '{member.name}' at byte {member.offset} should end at byte {end} but the file "
                    f"ends at {size}; copy or write the shard again"
                )
            yield member
            offset = tar.offset
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the zero block that ends every complete tar
        return
    except tarfile.TarError as error:
        if size == 0:
            raise ValueError(f"{path}: an empty file; delete it or write the shard again") from error
        what = "truncated, no end-of-archive block" if offset >= size else f"no readable tar header ({error})"
        raise ValueError(
            f"{path}: {what} at byte {offset}; shards are uncompressed tars: copy or write it again"
        ) from error


def _is_a_sample(sample: _Sample) -> bool:
    about_the_dataset = sample.key.lower() in _ABOUT_THE_DATASET or re.fullmatch("__.*__", sample.key)
    return bool(sample.images) or not about_the_dataset


def _image_of(path: Path, sample: _Sample) -> tuple[str, int, int]:
    images = sample.images
    if len(images) > 1:  # 'x.jpg' and 'x.seg.png': the one with a plain extension is the image
        images = [image for image in images if image[0] in IMAGE_EXTENSIONS]
    if len(images) == 1:
        return images[0]
    what = "no image" if not sample.images else "more than one image"
    raise ValueError(
        f"{path}: sample '{sample.key}' at byte {sample.start} has {what} (members: {sorted(sample.suffixes)}); every "
        f"sample needs one member that ends in {', '.join(IMAGE_EXTENSIONS)}: write the shard again"
    )


def _label(text: bytes) -> int:
    """The class number in a ``.cls`` member; class names in text are not numbers and count as no label."""
    try:
        label = int(text)
    except ValueError:
        return NO_LABEL
    return label if 0 <= label < 2**31 else NO_LABEL
