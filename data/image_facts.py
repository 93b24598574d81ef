"""What an image file holds, found by decoding all of it; and pictures of 16 bits rewritten with 8."""

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
    """Bits that the largest value needs, of a picture with 16 bits a value; None for all others."""
    is_gray: bool = False
    """With 16 bits a value."""
    has_more_pictures: bool = False
    """An animation, or pages; a photograph with previews (MPO) does not count."""
    is_turned: bool = False
    """EXIF says that it is to be shown turned or mirrored."""
    is_flat: bool = False
    """With 16 bits a value, of which all lie within a narrow range far from 0: one shade of gray in 8 bits."""
    is_transparent: bool = False
    """Some pixels are, in part or in full; the colors below them are used."""


def check_image(data: bytes, format: PixelFormat = RGB) -> ImageFacts:
    """Decodes the whole image; of other formats than `RGB`, which keep what is in the file, only the format is told.

    Raises:
        BadImage: as ``decode``.
    """
    if format != RGB or is_npy(data):
        read_pixels(data, format)
        name = "NPY" if is_npy(data) else "TIFF" if is_tiff(data) else _name(open_image(data))
        return ImageFacts(name)
    return check_opened(open_image(data), data)


def check_opened(image: Image.Image, data: bytes) -> ImageFacts:
    """The same of an image opened from these bytes, which is decoded afterwards unless it has 16 bits a value."""
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
    """A picture with 16 bits a value as a PNG of 8 bits, in which the largest number of `bits` bits is white.

    Transparency is dropped.

    Raises:
        BadImage: values need more bits; or as ``decode``.
    """
    image = open_image(data)
    white = min(2**bits - 1, white_of(image))
    try:
        values = read_16_bits(image)
        assert values is not None
        if values.max() > white:
            raise BadImage(
                f"values up to {values.max()} are over {white}, the largest number of {bits} bits", UNSUPPORTED
            )
        file = BytesIO()
        scale_to_8_bits(values, white, is_negative(image)).save(file, "PNG")
    except Exception as error:
        raise bad_image(error) from error
    return file.getvalue()


def _has_more_pictures(data: bytes) -> bool:
    image = open_image(data)  # again, as looking for the others moves on in the file
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # the second one is damaged, which does not matter
        return True


def _is_transparent(image: Image.Image) -> bool:
    """Of an image whose pixels have been read."""
    if image.mode in ("P", "L", "RGB") and "transparency" in image.info:  # a color that stands for it
        image = image.convert("RGBA")
    return "A" in image.getbands() and bool(np.asarray(image.getchannel("A")).min() < 255)


def orientation_of(image: Image.Image) -> int:
    """EXIF's number of an image whose pixels have been read: 1 if it is upright."""
    try:
        return int(image.getexif().get(_ORIENTATION, _UPRIGHT))  # Pillow has done what a TIFF file says
    except Exception:  # damaged metadata raises anything, and does not make the pixels worse
        return _UPRIGHT


def _is_flat(values: np.ndarray) -> bool:
    span = int(values.max()) - int(values.min())
    return values.ndim == 2 and 0 < span < WHITE_16_BITS // 16 and span < int(values.min())
