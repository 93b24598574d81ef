"""What packing finds out about images: kept for each shard until all are written, then reported."""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.image_facts import ImageFacts
from data.image_file import count_kinds
from data.index import Index
from data.scan import NO_LABEL
from data.storage.location import Location

DARK_BITS = 14  # an image that uses so few of 16 bits keeps at most a quarter of the gray levels
SHOWN_CLASSES = 20
SHOWN_REJECTED = 20


@dataclass
class PackReport:
    """What was found in a set of files."""

    rejected: list[str] = field(default_factory=list)  # lines of a file's name, kind and reason, tab-separated
    gray_bits: Counter[int] = field(default_factory=Counter)  # of images with 16 bits per value: bits used -> images
    color_bits: Counter[int] = field(default_factory=Counter)
    flat: int = 0  # 16-bit gray images in a narrow range far from 0
    images: int = 0  # packed
    more_pictures: int = 0  # files with several images, of which the first is used
    turned: int = 0  # rotated or mirrored by EXIF
    shrunk: int = 0  # rewritten with a shorter short side
    transparent: int = 0  # with pixels that are at least partly transparent

    def add(self, facts: ImageFacts) -> None:
        """Counts a packed image."""
        self.images += 1
        if facts.used_bits is not None:
            (self.gray_bits if facts.is_gray else self.color_bits)[facts.used_bits] += 1
        self.flat += facts.is_flat
        self.more_pictures += facts.has_more_pictures
        self.turned += facts.is_turned
        self.transparent += facts.is_transparent

    def write(self, path: Path) -> None:
        """Writes a file for `read`."""
        path.write_text(json.dumps(vars(self)), "utf-8")

    @classmethod
    def read(cls, path: Path) -> "PackReport":
        """What `write` wrote."""
        stored = json.loads(path.read_text("utf-8"))
        for name in ("gray_bits", "color_bits"):
            stored[name] = Counter({int(bits): count for bits, count in stored[name].items()})
        return cls(**stored)

    @classmethod
    def merge(cls, reports: Iterable["PackReport"]) -> "PackReport":
        """Combines reports into one."""
        merged = cls()
        for report in reports:
            merged.rejected += report.rejected
            merged.gray_bits += report.gray_bits
            merged.color_bits += report.color_bits
            merged.flat += report.flat
            merged.images += report.images
            merged.more_pictures += report.more_pictures
            merged.turned += report.turned
            merged.shrunk += report.shrunk
            merged.transparent += report.transparent
        return merged

    def remarks(self) -> Iterator[str]:
        """Yields what a user may want to change before training."""
        for bits, kind in ((self.gray_bits, "gray"), (self.color_bits, "color")):
            dark = [used for used in bits if used <= DARK_BITS]
            if dark:
                most = max(dark)
                yield (
                    f"{sum(bits[used] for used in dark)} of {bits.total()} 16-bit {kind} images have no value over "
                    f"{2**most - 1} of 65535 ({most} bits), and are used as they are, nearly black: "
                    f"--bits {most}, which needs another OUT, makes {2**most - 1} white"
                )
        if self.flat:
            yield (
                f"{self.flat} 16-bit gray images have all their values within a sixteenth of the range, far from 0, "
                f"and become almost a single shade: subtract the offset (for CT often 32768) before packing"
            )
        if self.more_pictures:
            yield (
                f"only the first image of files with several (animations, pages) is used: {self.more_pictures} of "
                f"{self.images}"
            )
        if self.shrunk:
            yield f"{self.shrunk} of {self.images} images were shrunk, the others packed unchanged"
        if self.turned:
            yield (
                "images rotated or mirrored by an EXIF orientation are used as they are stored: "
                f"{self.turned} of {self.images}; `exiftran -ai` rotates JPEG files losslessly before packing"
            )

        if self.transparent:
            yield (
                "images with transparent pixels are used with the colors stored under the transparency: "
                f"{self.transparent} of {self.images}; put them on a background before packing if these colors should "
                "not be seen"
            )

    def refusal(self, files: int, out: Path) -> str:
        """The error message if rejected files must not be left out."""
        lines = [line.split("\t") for line in self.rejected]
        shown = "\n".join(f"  {name}: {reason}" for name, _, reason in lines[:SHOWN_REJECTED])
        left = len(self.rejected) - SHOWN_REJECTED
        kinds = count_kinds(kind for _, kind, _ in lines)
        return (
            f"{len(self.rejected)} of {files} files are not readable images ({kinds}), nothing was published:\n{shown}"
            + (f"\n  ... and {left} more" if left > 0 else "")
            + f"\nrun again with --bad skip to leave them out, or fix them, delete {out} and pack again"
        )


def summary(index: Index, out: Location) -> str:
    """One line: how many samples, classes and shards."""
    labels = index.label[index.label != NO_LABEL]
    if index.classes:
        what = f"of {len(index.classes)} classes"
    else:
        what = f"with labels from {labels.min()} to {labels.max()}" if len(labels) else "without labels"
    if 0 < len(labels) < len(index):
        what += f" ({len(index) - len(labels)} without a label)"
    return f"{len(index)} samples {what} in {len(index.shards)} shards in {out}"


def class_table(index: Index) -> list[str]:
    """Lines of label, images and name of each class; if there are many, some of them, and the smallest and largest."""
    present, counted = np.unique(index.label[index.label != NO_LABEL], return_counts=True)
    images = dict.fromkeys(range(len(index.classes)), 0) | dict(zip(present.tolist(), counted.tolist(), strict=True))
    if not images:
        return []
    names = {label: index.classes[label] if label < len(index.classes) else "" for label in images}
    rows = [f"  {label:5d} {count:9d}  {names[label]}".rstrip() for label, count in images.items()]
    if len(rows) > SHOWN_CLASSES:
        low, high = min(images, key=images.__getitem__), max(images, key=images.__getitem__)
        half = SHOWN_CLASSES // 2
        rows = [
            *rows[:half],
            f"  ... {len(rows) - 2 * half} more; from {images[low]} images ({names[low] or low}) to {images[high]} "
            f"({names[high] or high})",
            *rows[-half:],
        ]
    return ["  label    images  class", *rows]


def empty_classes(index: Index) -> list[str]:
    """Names of the classes without images."""
    present = set(np.unique(index.label).tolist())
    return [name for label, name in enumerate(index.classes) if label not in present]


def note(remarks: Iterable[str]) -> None:
    """Prints what the user should know to stderr."""
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)
