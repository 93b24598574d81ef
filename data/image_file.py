"""Bytes -> an image that Pillow has opened, and its 8-bit RGB pixels, or the reason why it is no usable image."""

import warnings
from io import BytesIO

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

MAX_PIXELS = 100_000_000
MIN_SIDE = 8
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000")  # by Pillow's names
REDUCIBLE = ("JPEG", "MPO")  # MPO: a JPEG with further images after the first
_LIMIT = f"{MAX_PIXELS // 1_000_000} megapixels: make it smaller, or cut it into parts"
WHITE_16_BITS, WHITE_12_BITS = 65535, 4095
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF 6.0, section 4
_TIFF_MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1", b"avif", b"avis")  # ISO/IEC 23008-12
_WITHOUT_WHITE = {"F": "floating-point", "I": "signed or 32-bit", "LAB": "CIELAB"}  # by Pillow's modes

# Pillow warns of odd metadata, and from 89 megapixels on, once per worker. Metadata does not matter here, and our own
# limit refuses the image instead.
warnings.filterwarnings("ignore", module=r"PIL\.")
# Pillow refuses good PNGs for a megabyte of text or of color profile beside the pixels.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 100 * 2**20


class BadImage(Exception):  # noqa: N818  # a state of the data, not of the program
    """Bytes that are not a usable image; the text is the reason."""


def open_image(data: bytes) -> Image.Image:
    """Reads the header only.

    Raises:
        BadImage: no header of one of `FORMATS`, over 100 megapixels or a side under 8 pixels.
    """
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:  # Pillow's text has a memory address in it
        raise BadImage(_what_else(data)) from error
    except Exception as error:
        raise BadImage(reason(error)) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} is over {_LIMIT}")
    if min(width, height) < MIN_SIDE:
        raise BadImage(f"{width} x {height} is under {MIN_SIDE} pixels a side")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """All pixels, of any mode, with 8 bits a value; transparency is dropped.

    Raises:
        BadImage: the values do not say what is black and white. A damaged file raises anything else.
    """
    if image.mode in _WITHOUT_WHITE:  # Pillow would clip what is not from 0 to 255
        raise BadImage(
            f"{_WITHOUT_WHITE[image.mode]} pixels, which do not say what is black and white: "
            "convert it to 8 bits, or to unsigned 16 bits"
        )
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip everything above 255 to white
        return scale_to_8_bits(np.asarray(image), white_of(image), is_negative(image)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")  # CMYK and YCCK included: Pillow already undid Adobe's inversion


def scale_to_8_bits(gray: np.ndarray, white: int, negative: bool) -> Image.Image:
    """uint16 (H, W) -> 8 bits, rounded."""
    scaled = ((gray.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
    return Image.fromarray(255 - scaled if negative else scaled)


def white_of(image: Image.Image) -> int:
    """The largest value that a 16-bit gray image may have; TIFF has files that declare 12 bits."""
    declared = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE)
    return WHITE_12_BITS if declared == (12,) else WHITE_16_BITS


def is_negative(image: Image.Image) -> bool:
    """Whether 0 is white, as some TIFF files of X-rays have it; Pillow undoes it for 8 bits alone."""
    return bool(getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO)


def _what_else(data: bytes) -> str:
    if not data:
        return "an empty file"
    if data.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS in place of the image: `git lfs pull` gets it"
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        return "a HEIC or AVIF image: convert it to JPEG or PNG"
    if data[:4] in _TIFF_MARKS:
        return "a TIFF file that is damaged, or has other channels than gray, RGB or CMYK of up to 16 bits: convert it"
    return "not a JPEG, PNG, WebP, BMP, TIFF, GIF or JPEG 2000 image"


def reason(error: Exception) -> str:
    """What Pillow's error says of a file, the same in every process."""
    if isinstance(error, Image.DecompressionBombError):
        return f"over {_LIMIT}"
    return f"{error}" or type(error).__name__
