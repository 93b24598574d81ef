"""Images with 16 bits per value, and their conversion to 8 bits.

Pillow keeps only the upper 8 bits of colors. A second decoding with swapped byte order reads the lower ones, so that
colors are rounded like gray values, and scaled where their white is below 65535.
"""

import sys
from io import BytesIO

import numpy as np
from PIL import Image, ImageFile

WHITE_16_BITS, WHITE_12_BITS = 65535, 4095
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF 6.0, section 4
_OTHER_BYTES = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}  # in Pillow's raw modes
_COLORS = ("RGB;16", "RGBA;16")
_GRAY_AND_ALPHA = "LA;16B"  # in PNG; its four bytes are one pixel in Pillow's mode RGBA


def has_16_bit_colors(image: Image.Image) -> bool:
    """Whether an opened image, with its pixels not read yet, has 16-bit colors or 16-bit gray with transparency."""
    return any(_is_16_bit(_raw_mode(tile)) for tile in getattr(image, "tile", ()))


def read_16_bits(image: Image.Image, alpha: bool = False) -> np.ndarray | None:
    """Reads the values of an image with 16 bits each: uint16 (H, W), or (H, W, 3) for colors; None for other images.

    Args:
        image: opened, with its pixels not read yet.
        alpha: keep transparency as a channel: (H, W, 2) for gray, (H, W, 4) for colors. Otherwise gray with
            transparency becomes (H, W, 3), too.

    Raises:
        Exception: any, for a damaged file.
    """
    if image.mode.startswith("I;16"):
        image.load()  # here: NumPy would report a damaged file as not being an image
        return np.asarray(image).astype(np.uint16)
    if not has_16_bit_colors(image):
        return None
    data = image.fp.getvalue()  # type: ignore[attr-defined]  # a BytesIO until the pixels are read
    upper, lower = (Image.open(BytesIO(data), formats=[str(image.format)]) for _ in range(2))
    gray = _raw_mode(upper.tile[0]) == _GRAY_AND_ALPHA
    lower.tile = [_other_bytes(tile) for tile in lower.tile]
    lower.load()
    values = np.asarray(lower)
    if gray and alpha:
        return values[..., ::2].astype(np.uint16) << 8 | values[..., 1::2]
    if gray:
        return np.repeat(values[..., :1].astype(np.uint16) << 8 | values[..., 1:2], 3, axis=2)
    upper.load()
    kept = slice(None if alpha else 3)
    return np.asarray(upper)[..., kept].astype(np.uint16) << 8 | values[..., kept]


def scale_to_8_bits(values: np.ndarray, white: int, negative: bool) -> Image.Image:
    """Scales uint16 (H, W) or (H, W, 3) to 8 bits, rounded."""
    scaled = ((values.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
    return Image.fromarray(255 - scaled if negative else scaled)


def white_of(image: Image.Image) -> int:
    """The value of white in a 16-bit image; gray TIFF files may declare 12 bits."""
    declared = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE)
    return WHITE_12_BITS if declared == (12,) else WHITE_16_BITS


def is_negative(image: Image.Image) -> bool:
    """Whether 0 is white, as in some TIFF files of X-rays; Pillow inverts only those of 8 bits."""
    return bool(getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO)


def _is_16_bit(raw_mode: str) -> bool:
    return raw_mode[:-1] in _COLORS or raw_mode == _GRAY_AND_ALPHA


def _raw_mode(tile: ImageFile._Tile) -> str:
    """Pillow's name for the layout of the values in one tile of the file."""
    return str(tile.args[0] if isinstance(tile.args, tuple) and tile.args else tile.args)


def _other_bytes(tile: ImageFile._Tile) -> ImageFile._Tile:
    raw_mode = _raw_mode(tile)
    other = "RGBA" if raw_mode == _GRAY_AND_ALPHA else raw_mode[:-1] + _OTHER_BYTES[raw_mode[-1]]
    return tile._replace(args=(other, *tile.args[1:]) if isinstance(tile.args, tuple) else other)
