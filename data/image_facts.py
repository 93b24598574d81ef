"""What an image file holds, found by decoding all of it; and 16-bit gray pictures rewritten with 8."""

from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.image_file import (
    REDUCIBLE,
    WHITE_16_BITS,
    BadImage,
    is_negative,
    open_image,
    reason,
    scale_to_8_bits,
    to_rgb,
    white_of,
)

_ORIENTATION, _UPRIGHT = 274, 1  # EXIF 2.3, table 4


class ImageFacts(NamedTuple):
    """What a file holds, by its content."""

    format: str
    """One of `FORMATS`."""
    used_bits: int | None
    """Bits that the largest value needs, of a picture with 16 bits a value; None for all others."""
    is_gray: bool
    """With 16 bits a value."""
    has_more_pictures: bool
    """An animation, or pages; a photograph with previews (MPO) does not count."""
    is_turned: bool
    """EXIF says that it is to be shown turned or mirrored."""
    is_flat: bool
    """With 16 bits a value, of which all lie within a narrow range far from 0: one shade of gray in 8 bits."""


def check_image(data: bytes) -> ImageFacts:
    """Decodes the whole image.

    Raises:
        BadImage: as ``decode``.
    """
    image = open_image(data)
    stored_as = str(getattr(image, "tile", ""))  # Pillow reads 16-bit colors as their upper 8 bits
    try:
        has_more_pictures = image.format not in REDUCIBLE and bool(getattr(image, "is_animated", False))
        image.load()
        to_rgb(image)
        return ImageFacts(
            format="JPEG" if image.format in REDUCIBLE else str(image.format),
            used_bits=_used_bits(image, stored_as),
            is_gray=image.mode.startswith("I;16"),
            has_more_pictures=has_more_pictures,
            is_turned=orientation_of(image) != _UPRIGHT,
            is_flat=_is_flat(image),
        )
    except Exception as error:
        raise BadImage(reason(error)) from error


def rewrite_16_bit_gray(data: bytes, bits: int) -> bytes:
    """A gray picture with 16 bits a value as a PNG of 8 bits, in which the largest number of `bits` bits is white.

    Raises:
        BadImage: values need more bits; or as ``decode``.
    """
    image = open_image(data)
    white = min(2**bits - 1, white_of(image))
    try:
        image.load()
        gray = np.asarray(image)
        if gray.max() > white:
            raise BadImage(f"values up to {gray.max()} are over {white}, the largest number of {bits} bits")
        file = BytesIO()
        scale_to_8_bits(gray, white, is_negative(image)).save(file, "PNG")
    except Exception as error:
        raise BadImage(reason(error)) from error
    return file.getvalue()


def orientation_of(image: Image.Image) -> int:
    """EXIF's number of an image whose pixels have been read: 1 if it is upright."""
    try:
        return int(image.getexif().get(_ORIENTATION, _UPRIGHT))  # Pillow has done what a TIFF file says
    except Exception:  # damaged metadata raises anything, and does not make the pixels worse
        return _UPRIGHT


def _is_flat(image: Image.Image) -> bool:
    if not image.mode.startswith("I;16") or white_of(image) != WHITE_16_BITS:
        return False
    values = np.asarray(image)
    span = int(values.max()) - int(values.min())
    return 0 < span < WHITE_16_BITS // 16 and span < int(values.min())


def _used_bits(image: Image.Image, stored_as: str) -> int | None:
    if image.mode.startswith("I;16"):
        return int(np.asarray(image).max()).bit_length() if white_of(image) == WHITE_16_BITS else None
    if ";16" not in stored_as:
        return None
    colors = [np.asarray(image.getchannel(band)) for band in image.getbands() if band != "A"]
    return 8 + int(np.max(colors)).bit_length()
