"""Reads the headers of one tar shard: its samples, where their bytes are and, on request, their checksums."""

import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

import numpy as np

from data.multi_labels import Label, MultiLabels, UnusableLabel, read_cls, read_json
from data.names import readable
from data.storage.client import Object
from data.storage.files import open_shard
from data.storage.location import Location
from data.tar_members import FOLDER, HARD_LINK, HEADER, SPARSE, SYMBOLIC_LINK, Member, header_problem, read_members

IMAGE_EXTENSIONS = ("jpg", "jpeg", "jfif", "png", "webp", "bmp", "tif", "tiff", "gif", "jp2", "avif", "heic", "heif")
ARRAY_EXTENSION = "npy"  # the image of a sample that has none of these
NO_LABEL = -1
MAX_LABEL_FILE = 1 << 24  # bytes
_CHUNK = 1 << 20  # bytes of an image that are read at once

# WebDataset's grammar: the key is the path up to the first dot of the base name, the rest is the (lower-cased)
# extension.
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
# What WebDataset skips: top-level names such as __index__ and everything below such folders.
_SKIPPED = re.compile(r"__[^/]*__($|/)")
# What macOS (._x.jpg, __MACOSX) and others hide.
_HIDDEN = re.compile(r"(^|/)([.](?!/|[.]/)|__MACOSX/)")
_LABEL_READERS = {"cls": read_cls, "json": read_json}
# Names of files about the whole data set, found in some shards; any other sample without an image is an error.
_ABOUT_THE_DATASET = frozenset(
    {"readme", "license", "classes", "labels", "dataset", "dataset_info", "metadata", "info"}
)


@dataclass(frozen=True, eq=False)
class ShardContent:
    """The samples of one shard, in the order of their members; n samples."""

    keys: tuple[str, ...]
    offset: np.ndarray  # int64 (n,), first byte of the image in the shard
    length: np.ndarray  # int64 (n,), bytes of the image
    label: np.ndarray  # int32 (n,), NO_LABEL where there is none
    multi_labels: MultiLabels  # of n samples; empty where a sample has no list of labels
    has_list: np.ndarray  # bool (n,), whether a sample has a list, even an empty one
    checksum: np.ndarray | None = None  # uint32 (n,), CRC-32 of the image's bytes, if they were read
    label_problem: str = ""  # about the first sample whose label is invalid
    unused: Counter[str] = field(default_factory=Counter)  # unused members, by kind


class _Image(NamedTuple):
    suffix: str
    offset: int
    length: int
    checksum: int  # 0 if the bytes were not read


@dataclass
class _Sample:
    key: str
    start: int
    suffixes: set[str] = field(default_factory=set)
    images: list[_Image] = field(default_factory=list)
    arrays: list[_Image] = field(default_factory=list)
    labels: dict[str, Label] = field(default_factory=dict)  # by the suffix of the member
    problems: dict[str, str] = field(default_factory=dict)  # of invalid labels, by the suffix of the member

    @property
    def label(self) -> Label:
        """The label; if there are two, that of the ``.cls`` member."""
        return self.labels["cls"] if "cls" in self.labels else self.labels.get("json")

    @property
    def problem(self) -> str:
        """Why the label is invalid, or ''."""
        return "" if "cls" in self.labels else self.problems.get("cls", self.problems.get("json", ""))


def split_name(name: str) -> tuple[str, str] | None:
    """Splits a tar member's name into (key, extension), as WebDataset does; None for one that it does not group."""
    match = _NAME.match(name)
    if match is None or _SKIPPED.match(name):
        return None
    return match.group(1), match.group(2).lower()


def scan_shard(
    path: Location, numbers: Mapping[str, int] | None = None, what: Object | None = None, checksums: bool = False
) -> ShardContent:
    """Lists the samples of a shard from its tar headers, seeking over the images; a shard in a store is streamed once.

    Args:
        path: the shard.
        numbers: the classes that labels may name, with their numbers.
        what: size and version of a shard in a store, if known.
        checksums: also read the images, for `ShardContent.checksum`.

    Raises:
        ValueError: the file is not a complete, uncompressed tar, or its samples are not usable; says where and what to
            do.
    """
    unused = Counter[str]()
    with open_shard(path, what) as file:
        samples = list(_samples(path, file, numbers or {}, unused, checksums))
    if not samples:
        others = f" (only {describe_unused(unused)})" if unused else ""
        links = "; links have no content, `tar -h` packs what they point to" if unused[SYMBOLIC_LINK] else ""
        raise ValueError(f"{path}: an empty shard, without samples{others}; delete the file or write it again{links}")
    found = [_image_of(sample) for sample in samples]
    images = [image for image in found if not isinstance(image, str)]
    if len(images) < len(samples):
        first = next(number for number, image in enumerate(found) if isinstance(image, str))
        count = len(samples) - len(images)
        more = f", as do {count - 1} others of {len(samples)}" if count > 1 else ""
        raise ValueError(
            f"{path}: sample '{readable(samples[first].key)}' at byte {samples[first].start} has {found[first]}{more}; "
            f"every sample needs one member ending in {', '.join(IMAGE_EXTENSIONS)}: write the shard again"
        )
    labels = [sample.label for sample in samples]
    problems = (f"{path}: sample '{readable(sample.key)}': {sample.problem}" for sample in samples if sample.problem)
    return ShardContent(
        keys=tuple(sample.key for sample in samples),
        offset=np.array([image.offset for image in images], np.int64),
        length=np.array([image.length for image in images], np.int64),
        label=np.array([label if isinstance(label, int) else NO_LABEL for label in labels], np.int32),
        multi_labels=MultiLabels.of([label if isinstance(label, tuple) else () for label in labels]),
        has_list=np.array([isinstance(label, tuple) for label in labels]),
        checksum=np.array([image.checksum for image in images], np.uint32) if checksums else None,
        label_problem=next(problems, ""),
        unused=unused,
    )


def describe_unused(unused: Counter[str]) -> str:
    """Counts unused members by kind, the most frequent first."""
    return ", ".join(f"{count} x {kind}" for kind, count in unused.most_common())


def _samples(
    path: Location, file: BinaryIO, numbers: Mapping[str, int], unused: Counter[str], checksums: bool
) -> Iterator[_Sample]:
    keys: set[str] = set()
    without_bytes: list[Member] = []
    current: _Sample | None = None
    for member in read_members(path, file):
        if member.kind == FOLDER:
            continue
        name = None if _HIDDEN.search(member.name) else split_name(member.name)
        if name is None:
            unused[member.kind or _why_no_sample(member.name)] += 1
            continue
        key, suffix = name
        extension = suffix.rpartition(".")[2]
        if member.kind:
            unused[member.kind] += 1
            if extension in IMAGE_EXTENSIONS or suffix in _LABEL_READERS:
                without_bytes.append(member)
            continue
        if current is None or key != current.key:
            if current is not None and _is_a_sample(current, unused):
                yield current
            if key in keys:
                raise ValueError(
                    f"{path}: duplicate key '{readable(key)}' at byte {member.header}; a key may occur only once in a "
                    "shard, and its members must be adjacent: write the shard again"
                )
            keys.add(key)
            current = _Sample(key, member.header)
        if suffix in current.suffixes:
            raise ValueError(
                f"{path}: duplicate key '{readable(key)}', two members '{readable(member.name)}', the "
                f"second at byte {member.header}"
            )
        current.suffixes.add(suffix)
        if extension in IMAGE_EXTENSIONS or extension == ARRAY_EXTENSION:
            kind = current.arrays if extension == ARRAY_EXTENSION else current.images
            kind.append(_read_image(path, suffix, member, file, checksums))
        elif suffix not in _LABEL_READERS or not _read_label(current, suffix, member, file, numbers):
            unused[f".{suffix}"] += 1
    if without_bytes:
        raise ValueError(_without_bytes(path, without_bytes))
    if current is not None and _is_a_sample(current, unused):
        yield current


def _read_image(path: Location, suffix: str, member: Member, file: BinaryIO, checksums: bool) -> _Image:
    """Reads the header right before an image, and the image if its checksum is wanted."""
    file.seek(member.offset - HEADER)
    if problem := header_problem(file.read(HEADER), member.size):
        raise ValueError(f"{path}: '{readable(member.name)}' at byte {member.header}: {problem}; write the shard again")
    checksum, left = 0, member.size if checksums else 0
    while left and (chunk := file.read(min(left, _CHUNK))):
        checksum, left = zlib.crc32(chunk, checksum), left - len(chunk)
    return _Image(suffix, member.offset, member.size, checksum)


def _read_label(sample: _Sample, suffix: str, member: Member, file: BinaryIO, numbers: Mapping[str, int]) -> bool:
    """Reads the label in a member; returns whether there is one."""
    if member.size > MAX_LABEL_FILE:
        sample.problems[suffix] = f"its .{suffix} has {member.size} bytes: labels have at most {MAX_LABEL_FILE}"
        return True
    file.seek(member.offset)
    try:
        label = _LABEL_READERS[suffix](file.read(member.size), numbers)
    except UnusableLabel as error:
        sample.problems[suffix] = str(error)
        return True
    if label is not None:
        sample.labels[suffix] = label
    return label is not None


def _why_no_sample(name: str) -> str:
    if _HIDDEN.search(name):
        return "hidden file"
    return "name that begins with __" if _SKIPPED.match(name) else "name without an extension"


def _without_bytes(path: Location, members: list[Member]) -> str:
    """Says what is wrong with members of samples that are links, devices or the like."""
    counts, first = Counter(member.kind for member in members), members[0]
    advice = {
        SYMBOLIC_LINK: "write the shard again with `tar -h`, which packs what links point to",
        HARD_LINK: "write the shard again with `tar --hard-dereference`, or with what they point to",
        SPARSE: "write the shard again without `tar --sparse`",
    }.get(first.kind, "write the shard again with regular files")
    return (
        f"{path}: sample members whose bytes are not in the tar ({describe_unused(counts)}; the first is "
        f"'{readable(first.name)}' at byte {first.header}): {advice}"
    )


def _is_a_sample(sample: _Sample, unused: Counter[str]) -> bool:
    """Whether the members found under a key make a sample; arrays beside its image are added to `unused`."""
    about_the_dataset = sample.key.lower() in _ABOUT_THE_DATASET or re.fullmatch("__.*__", sample.key)
    if sample.images or about_the_dataset:
        unused.update(f".{image.suffix}" for image in sample.arrays)
    else:
        sample.images = sample.arrays
    return bool(sample.images) or not about_the_dataset


def _image_of(sample: _Sample) -> _Image | str:
    """Returns a sample's image, or a text that says what it has instead of one."""
    images = sample.images
    if len(images) > 1:  # 'x.jpg' and 'x.seg.png': the one with a plain extension is the image
        images = [image for image in images if image.suffix in (*IMAGE_EXTENSIONS, ARRAY_EXTENSION)]
    if len(images) > 1:  # a converted image, and the phone's photograph
        images = [image for image in images if image.suffix not in ("heic", "heif")]
    if len(images) == 1:
        return images[0]
    what = "no image" if not sample.images else "more than one image"
    return f"{what} (members: {', '.join(f'.{readable(suffix)}' for suffix in sorted(sample.suffixes))})"
