"""Bytes -> an image opened by Pillow, and its 8-bit RGB pixels, or the reason why the image is not usable."""

import logging
import warnings
from collections import Counter
from collections.abc import Iterable
from io import BytesIO

from PIL import AvifImagePlugin, Image, PngImagePlugin, UnidentifiedImageError

from data.bit_depth import is_negative, read_16_bits, scale_to_8_bits, white_of

MAX_PIXELS = 100_000_000
MAX_BYTES = 1 << 30  # of a file; 100 megapixels of 16-bit RGBA take 800 MB
MIN_SIDE = 8
REDUCIBLE = ("JPEG", "MPO")  # MPO: a JPEG with further images after the first
# Why a file is not a usable image, in a word or two.
EMPTY, NO_IMAGE, UNSUPPORTED, DAMAGED = "empty", "no image", "unsupported", "damaged"
TOO_LARGE, TOO_SMALL = "too large", "too small"
GET_HEIC = "the extra `heif` reads it (pip install 'lomar-deepspeed[heif]')"
OTHER_CHANNELS, OTHER_TYPE = "other channels", "other type"  # than requested
_LIMIT = f"{MAX_PIXELS // 1_000_000} megapixels: make it smaller, or cut it into parts"
_TIFF_MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_AVIF_BRANDS = (b"avif", b"avis")
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1")  # ISO/IEC 23008-12
_MARKS = {  # first bytes -> format
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
}
_WITHOUT_WHITE = {"F": "floating-point", "I": "signed or 32-bit", "LAB": "CIELAB"}  # by Pillow's modes

# Pillow warns about odd metadata, and from 89 megapixels on, once per worker. Metadata does not matter here, and our
# own limit refuses large images instead.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)  # it logs a line for each file that it cannot read
# By default Pillow refuses valid PNGs with a megabyte of text or of color profile beside the pixels.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 100 * 2**20
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a worker has one core
try:
    from pillow_heif import register_heif_opener
except ImportError:  # the extra `heif`
    READS_HEIC = False
else:
    register_heif_opener(thumbnails=False, decode_threads=1)
    READS_HEIC = True
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000", "AVIF", *(("HEIF",) if READS_HEIC else ()))


class BadImage(Exception):  # noqa: N818  # a state of the data, not of the program
    """Bytes that are not a usable image; the text is the reason."""

    def __init__(self, text: str, kind: str = DAMAGED) -> None:
        super().__init__(text)
        self.kind = kind
        """The kind of reason: one of the words above."""


def check_length(length: int) -> None:
    """Raises BadImage for a length that no image file has."""
    if length == 0:
        raise BadImage("an empty file", EMPTY)
    if length > MAX_BYTES:
        raise BadImage(f"{length} bytes exceed {MAX_BYTES}, more than any image of {_LIMIT}", TOO_LARGE)


def check_size(width: int, height: int) -> None:
    """Raises BadImage for unsupported sizes."""
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} is over {_LIMIT}", TOO_LARGE)
    if min(width, height) < MIN_SIDE:
        raise BadImage(f"{width} x {height} is under {MIN_SIDE} pixels a side", TOO_SMALL)


def is_tiff(data: bytes) -> bool:
    """Whether these bytes begin like a TIFF file."""
    return data[:4] in _TIFF_MARKS


def open_image(data: bytes) -> Image.Image:
    """Opens an image; reads only its header.

    Raises:
        BadImage: no header of one of `FORMATS`, over 100 megapixels or a side under 8 pixels.
    """
    check_length(len(data))
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:  # Pillow's text has a memory address in it
        raise _unidentified(data) from error
    except Exception as error:
        raise bad_image(error) from error
    check_size(*image.size)
    if image.mode in _WITHOUT_WHITE:  # Pillow would clip values outside 0 to 255
        raise BadImage(
            f"{_WITHOUT_WHITE[image.mode]} pixels, for which black and white are undefined: "
            "convert it to 8 bits, or to unsigned 16 bits",
            UNSUPPORTED,
        )
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an opened image of any mode to RGB with 8 bits per value; transparency is dropped.

    Raises:
        Exception: any, for a damaged file.
    """
    values = read_16_bits(image)
    if values is not None:
        return scale_to_8_bits(values, white_of(image), is_negative(image)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")  # CMYK and YCCK included: Pillow already undid Adobe's inversion


def bad_image(error: Exception) -> BadImage:
    """Makes a BadImage of an error of Pillow, with the same text in every process."""
    if isinstance(error, BadImage):
        return BadImage(str(error), error.kind)
    if isinstance(error, Image.DecompressionBombError):
        return BadImage(f"over {_LIMIT}", TOO_LARGE)
    return BadImage(f"{error}".strip() or type(error).__name__)


def count_kinds(kinds: Iterable[str]) -> str:
    """Counts the images of each kind, the most frequent first: `12 damaged, 3 empty`."""
    return ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).most_common())


def _unidentified(data: bytes) -> BadImage:
    if not data.strip(b"\0"):
        return BadImage("nothing but zeros, as left by an unfinished copy: copy it again", NO_IMAGE)
    if data.startswith(b"version https://git-lfs"):
        return BadImage("a Git LFS pointer instead of the image: `git lfs pull` gets it", NO_IMAGE)
    if data[4:8] == b"ftyp" and data[8:12] in _AVIF_BRANDS:
        if AvifImagePlugin.SUPPORTED:
            return BadImage("an AVIF file that is damaged")
        return BadImage("an AVIF image: convert it to JPEG or PNG", UNSUPPORTED)
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        if READS_HEIC:
            return BadImage("a HEIC file that is damaged, or has no image that can be read")
        return BadImage(f"a HEIC image: {GET_HEIC}, or convert it to JPEG or PNG", UNSUPPORTED)
    if is_tiff(data):
        return BadImage("a TIFF file that is damaged, or is not gray, RGB or CMYK of up to 16 bits: convert it")
    for mark, name in _MARKS.items():
        if data.startswith(mark):
            return BadImage(f"a {name} file whose header is damaged")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return BadImage("a WebP file whose header is damaged")
    return BadImage("not a JPEG, PNG, WebP, BMP, TIFF, GIF, JPEG 2000, AVIF or HEIC image", NO_IMAGE)
