"""What loading costs: cores, bytes read, and the host's memory of the index.

Measured by `benchmarks/loader.py` on 500 photographs of ImageNet (mean 475x392 pixels, 111 KB), RandomResizedCrop, in
seconds of an idle core: 395 images a second at 224 pixels, 256 at 448; 713 and 361 of the same photographs, shrunk to a
short side of 288 pixels (37 KB); 650 and 346 views by `data.repeats=2`. Reading and decoding take the same for views of
any size, and grow with a file's length; what each view takes besides grows with its area. That fits all six within 3 %.
"""

from collections.abc import Sequence
from typing import NamedTuple

from data.order import PART
from data.transforms import Augmentation

DECODE, DECODE_BYTE = 0.31e-3, 15.2e-9  # seconds, of a photograph and of each of its bytes
VIEW = 0.11e-3  # of a view, besides its pixels: drawing, flipping, batching
PIXEL = 0.44e-3 / 224**2  # of each pixel of a view
COLOR_JITTER, THREE_AUGMENT = 2.8e-3 / 224**2, 0.86e-3 / 224**2  # of each pixel, where it is applied
INDEX_BYTES = 8 + 8 + 4 + 20 + 8  # of each sample: offset, length, label, the key (20 characters) and its end
ORDER_BYTES = 24  # of each sample of an epoch's order while it is sorted, in each rank


def index_bytes(images: int, ranks: int) -> int:
    """The host's memory for the index, which the ranks share, and for the part of the order that each of them has."""
    return images * INDEX_BYTES + ranks * min(images, PART) * ORDER_BYTES


class Photographs(NamedTuple):
    """The files that are trained on; by default ImageNet's."""

    bytes: float = 111e3  # of each, on average
    shrunk: str = ""  # how they were made smaller as they were packed, of their index

    @property
    def decode(self) -> float:
        """Seconds of one core for one."""
        return DECODE + DECODE_BYTE * self.bytes


IMAGENET = Photographs()
SMALLER = Photographs(37e3, "--short-side 288 --quality 90")  # the same ones


def core_seconds(
    size: tuple[int, int], augmentations: Sequence[Augmentation], repeats: int, photographs: Photographs
) -> float:
    """Seconds of one core for a sample; LUT's two views, and repeats, are cut out of one decoded photograph."""
    seconds = photographs.decode / repeats
    for view in augmentations:
        pixel = PIXEL + view.color_jitter * COLOR_JITTER + view.three_augment * THREE_AUGMENT
        seconds += VIEW + pixel * size[0] * size[1]
    return seconds
