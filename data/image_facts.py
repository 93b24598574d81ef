"""What an image file holds, found by decoding all of it; and rewriting 16-bit images with 8 bits."""

from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.bit_depth import WHITE_16_BITS, is_negative, read_16_bits, scale_to_8_bits, white_of
from data.channels import is_npy, read_pixels
from data.image_file import REDUCIBLE, UNSUPPORTED, BadImage, bad_image, is_tiff, open_image, to_rgb
from data.pixel_format import RGB, PixelFormat

_ORIENTATION, _UPRIGHT = 274, 1  # EXIF 2.3, table 4


class ImageFacts(NamedTuple):
    """What a file holds, by its content."""

    format: str
    """One of `FORMATS`, or NPY."""
    used_bits: int | None = None
    """Bits that the largest value needs, if values have 16 bits; None for others, and where 12 bits are declared."""
    is_gray: bool = False
    """Gray with 16 bits per value."""
    has_more_pictures: bool = False
    """An animation, or pages; a photograph with previews (MPO) does not count."""
    is_turned: bool = False
    """EXIF says that it is to be shown rotated or mirrored."""
    is_flat: bool = False
    """16 bits per value, all within a narrow range far from 0: one shade of gray in 8 bits."""
    is_transparent: bool = False
    """Some pixels are partly or fully transparent; the colors stored for them are used."""


def check_image(data: bytes, format: PixelFormat = RGB) -> ImageFacts:
    """Decodes the whole image; for formats other than `RGB`, which keep the file's values, reports only the format.

    Raises:
        BadImage: as in ``decode``.
    """
    if format != RGB or is_npy(data):
        read_pixels(data, format)
        name = "NPY" if is_npy(data) else "TIFF" if is_tiff(data) else _name(open_image(data))
        return ImageFacts(name)
    return check_opened(open_image(data), data)


def check_opened(image: Image.Image, data: bytes) -> ImageFacts:
    """Like `check_image`, for an image opened from these bytes; leaves it decoded unless it has 16 bits per value."""
    try:
        values = read_16_bits(image)
        if values is None:
            to_rgb(image)
        return ImageFacts(
            format=_name(image),
            used_bits=None if values is None or white_of(image) != WHITE_16_BITS else int(values.max()).bit_length(),
            is_gray=values is not None and values.ndim == 2,
            has_more_pictures=image.format not in REDUCIBLE and _has_more_pictures(data),
            is_turned=orientation_of(image) != _UPRIGHT,
            is_flat=values is not None and white_of(image) == WHITE_16_BITS and _is_flat(values),
            is_transparent=_is_transparent(image),
        )
    except Exception as error:  # a decoder fed with arbitrary bytes raises arbitrary errors
        raise bad_image(error) from error


def _name(image: Image.Image) -> str:
    return "JPEG" if image.format in REDUCIBLE else str(image.format)


def rewrite_16_bits(data: bytes, bits: int) -> bytes:
    """Rewrites an image with 16 bits per value as a PNG of 8 bits, with the largest `bits`-bit number as white.

    Transparency is dropped.

    Raises:
        BadImage: values need more bits; or as in ``decode``.
    """
    image = open_image(data)
    white = min(2**bits - 1, white_of(image))
    try:
        values = read_16_bits(image)
        assert values is not None
        if values.max() > white:
            raise BadImage(f"values up to {values.max()} exceed {white}, the largest {bits}-bit number", UNSUPPORTED)
        file = BytesIO()
        scale_to_8_bits(values, white, is_negative(image)).save(file, "PNG")
    except Exception as error:
        raise bad_image(error) from error
    return file.getvalue()


def _has_more_pictures(data: bytes) -> bool:
    image = open_image(data)  # again: looking for other images moves the position in the file
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # the second one is damaged, which does not matter
        return True


def _is_transparent(image: Image.Image) -> bool:
    """Whether an image whose pixels have been read has transparent ones."""
    if image.mode in ("P", "L", "RGB") and "transparency" in image.info:  # a color that marks transparency
        image = image.convert("RGBA")
    return "A" in image.getbands() and bool(np.asarray(image.getchannel("A")).min() < 255)


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation of an image whose pixels have been read; 1 is upright."""
    try:
        return int(image.getexif().get(_ORIENTATION, _UPRIGHT))  # Pillow has already applied a TIFF file's
    except Exception:  # damaged metadata raises anything, and does not affect the pixels
        return _UPRIGHT


def _is_flat(values: np.ndarray) -> bool:
    span = int(values.max()) - int(values.min())
    return values.ndim == 2 and 0 < span < WHITE_16_BITS // 16 and span < int(values.min())
