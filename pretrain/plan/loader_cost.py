"""What loading costs: cores, bytes read, and the host's memory for the index.

Measured by `benchmarks/loader.py` on 500 photographs of ImageNet (mean 475x392 pixels, 111 KB), RandomResizedCrop, on
an idle core: 395 images a second at 224 pixels, 256 at 448; 713 and 361 from the same photographs, shrunk to a short
side of 288 pixels (37 KB); 650 and 346 views with `data.repeats=2`. The time to read and decode is independent of the
view's size and grows with the file's length; the rest of a view's time grows with its area. That fits all six within
3 %.
"""

from collections.abc import Sequence
from typing import NamedTuple

from data.order import PART
from data.transforms import Augmentation

DECODE, DECODE_BYTE = 0.31e-3, 15.2e-9  # seconds per photograph, and per byte of it
VIEW = 0.11e-3  # per view, besides its pixels: drawing, flipping, batching
PIXEL = 0.44e-3 / 224**2  # per pixel of a view
COLOR_JITTER, THREE_AUGMENT = 2.8e-3 / 224**2, 0.86e-3 / 224**2  # per pixel, where it is applied
INDEX_BYTES = 8 + 8 + 4 + 20 + 8  # per sample: offset, length, label, the key (20 characters) and its end
ORDER_BYTES = 24  # per sample of an epoch's order while it is sorted, in each rank


def index_bytes(images: int, ranks: int) -> int:
    """The host's memory for the index, which the ranks share, and for each rank's part of the order."""
    return images * INDEX_BYTES + ranks * min(images, PART) * ORDER_BYTES


class Photographs(NamedTuple):
    """The training files; by default ImageNet's."""

    bytes: float = 111e3  # of each, on average
    shrunk: str = ""  # how they were shrunk when packed, from their index

    @property
    def decode(self) -> float:
        """Seconds of one core for one file."""
        return DECODE + DECODE_BYTE * self.bytes


IMAGENET = Photographs()
SMALLER = Photographs(37e3, "--short-side 288 --quality 90")  # the same photographs


def core_seconds(
    size: tuple[int, int], augmentations: Sequence[Augmentation], repeats: int, photographs: Photographs
) -> float:
    """Seconds of one core for a sample; LUT's two views, and repeats, are crops of one decoded photograph."""
    seconds = photographs.decode / repeats
    for view in augmentations:
        pixel = PIXEL + view.color_jitter * COLOR_JITTER + view.three_augment * THREE_AUGMENT
        seconds += VIEW + pixel * size[0] * size[1]
    return seconds
