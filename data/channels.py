"""Bytes of an image file -> its pixels as stored, with any number of channels.

``decode`` itself handles 8-bit RGB, the format of photographs, and converts grays, palettes and CMYK to it. Here a file
must have the requested channels and dtype. The exception: three channels of 16 bits are also made from gray, and drop
transparency.
"""

import logging
import math
import re
import zlib
from io import BytesIO
from typing import Any, get_args

import numpy as np
from PIL import Image, TiffImagePlugin

from data.bit_depth import has_16_bit_colors, is_negative, read_16_bits, white_of
from data.image_file import (
    DAMAGED,
    MAX_BYTES,
    OTHER_CHANNELS,
    OTHER_TYPE,
    TOO_LARGE,
    UNSUPPORTED,
    BadImage,
    bad_image,
    check_size,
    is_tiff,
    open_image,
    to_rgb,
)
from data.pixel_format import MAX_CHANNELS, DType, PixelFormat

NPY = b"\x93NUMPY"
_MAX_HEADER = 4096  # bytes; an array without fields needs a hundred
_COMPRESSIONS = (1, 8, 32946)  # none, and deflate under its two numbers
_MEANINGS, _ORIENTATION = (1, 2), 274  # photometrics: 0 is black, or RGB; a tag
_BITS_PER_SAMPLE, _SAMPLES_PER_PIXEL, _PLANES = 258, 277, 284  # TIFF 6.0, sections 4, 6 and 8
_HEADER = re.compile(
    rb"\{\s*'descr':\s*'([^'\\]{1,20})',\s*'fortran_order':\s*(True|False),\s*"
    rb"'shape':\s*\((\d{1,9}),\s*(\d{1,9})(?:,\s*(\d{1,9}))?,?\s*\),?\s*\}\s*"
)


def is_npy(data: bytes) -> bool:
    """Whether these bytes begin like a .npy file."""
    return data.startswith(NPY)


def read_pixels(data: bytes, format: PixelFormat) -> np.ndarray:
    """Reads all pixels of a file.

    Args:
        data: an image file such as PNG or TIFF, or a .npy file with an array (H, W, C), or (H, W) for one channel.
        format: required of the pixels.

    Returns:
        (H, W, C) in the format's dtype and the machine's byte order.

    Raises:
        BadImage: as in ``decode``, or channels or dtype differ. No other exception, whatever the bytes.
    """
    try:
        values = read_npy(data) if is_npy(data) else _read_image(data, format)
    except Exception as error:  # a decoder fed with arbitrary bytes raises arbitrary errors
        raise bad_image(error) from error
    values = values[..., None] if values.ndim == 2 else values
    channels = values.shape[2]
    if channels != format.channels:
        raise BadImage(f"channels: {channels}, not data.channels={format.channels}", OTHER_CHANNELS)
    if values.dtype != format.dtype:
        raise BadImage(f"values: {values.dtype}, not data.dtype={format.dtype}", OTHER_TYPE)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise BadImage("non-finite values: fill in what is missing, or leave the image out")
    return values


def read_npy(data: bytes) -> np.ndarray:
    """Reads the array of a .npy file, (H, W) or (H, W, C), without NumPy's reader, which can unpickle.

    The header is trusted only if its shape and dtype fit an image and account for exactly the bytes that follow.

    Raises:
        BadImage: anything else.
    """
    start = 10 if data[6:7] == b"\x01" else 12  # version 1 has a length of two bytes
    length = int.from_bytes(data[8:start], "little")
    if data[6:7] not in (b"\x01", b"\x02", b"\x03") or length > _MAX_HEADER or len(data) < start + length:
        raise BadImage(f"a .npy file whose header is damaged or too long ({length} bytes, at most {_MAX_HEADER})")
    header = _HEADER.fullmatch(data[start : start + length])
    if header is None:
        raise BadImage("a .npy file that does not hold a numeric array (height, width, channels)", UNSUPPORTED)
    descr, fortran, *sides = (part.decode() if part else "" for part in header.groups())
    shape = tuple(int(side) for side in sides if side)
    if descr not in ("|u1", "<u2", ">u2", "<f4", ">f4"):
        raise BadImage(f"a .npy file of dtype {descr}: save it as uint8, uint16 or float32", UNSUPPORTED)
    if len(shape) == 3 and shape[2] > MAX_CHANNELS >= shape[0]:
        raise BadImage(f"a .npy file of shape {shape}: save it as (height, width, channels)", OTHER_CHANNELS)
    check_size(shape[1], shape[0])
    dtype = np.dtype(descr)
    expected, given = math.prod(shape) * dtype.itemsize, len(data) - start - length
    if expected != given:
        raise BadImage(f"a .npy file with {given} bytes of values, but its header says {expected}")
    values = np.frombuffer(data, dtype, offset=start + length).reshape(shape, order="F" if fortran == "True" else "C")
    return np.ascontiguousarray(values, dtype.newbyteorder("="))


def _read_image(data: bytes, format: PixelFormat) -> np.ndarray:
    """Reads the pixels of any other file as stored: (H, W) or (H, W, C)."""
    try:
        image = open_image(data)
    except BadImage as error:
        if not is_tiff(data) or error.kind not in (DAMAGED, UNSUPPORTED):
            raise
        return _read_tiff(data, error)
    if is_tiff(data) and format.channels != 3 and _pages(image) == format.channels > 1:
        return _read_pages(data, format)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and (lost := _lost(image)):
        return _read_tiff(data, BadImage(f"a TIFF file from which Pillow would drop {lost}", UNSUPPORTED))
    values = read_16_bits(image, alpha=format.channels != 3)
    if values is not None:
        if is_negative(image):
            values = np.subtract(white_of(image), values, dtype=np.uint16)
        return np.repeat(values[..., None], 3, axis=2) if values.ndim == 2 and format.channels == 3 else values
    if image.format == "AVIF" or (image.format == "JPEG2000" and image.mode != "L"):
        raise BadImage(f"{image.format}, of which Pillow reads only 8 bits: convert it to PNG or TIFF", UNSUPPORTED)
    return _read_8_bits(image, format)


def _read_8_bits(image: Image.Image, format: PixelFormat) -> np.ndarray:
    if format.channels == 3 or image.mode in ("CMYK", "YCbCr"):  # these mean colors
        return np.asarray(to_rgb(image))
    if image.mode == "P":
        return np.asarray(image.convert("RGBA" if "transparency" in image.info else "RGB"))
    return np.asarray(image.convert("L") if image.mode == "1" else image)


def _check_all(width: int, height: int, pixel: int) -> None:
    """Raises BadImage for unsupported sizes, or if all pixels, of `pixel` bytes each, exceed `MAX_BYTES`."""
    check_size(width, height)
    if width * height * pixel > MAX_BYTES:
        raise BadImage(f"{width} x {height} pixels of {pixel} bytes exceed {MAX_BYTES}: cut it into parts", TOO_LARGE)


def _lost(image: TiffImagePlugin.TiffImageFile) -> str:
    """Names what Pillow would lose of a TIFF file; '' if nothing."""
    samples = image.tag_v2.get(_SAMPLES_PER_PIXEL, 1)
    if samples != len(image.getbands()):
        return "channels"
    is_wide = max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,))) > 8
    whole = image.mode.startswith("I;16") or has_16_bit_colors(image)
    return "bits" if is_wide and (not whole or (samples > 1 and image.tag_v2.get(_PLANES, 1) != 1)) else ""


def _pages(image: Image.Image) -> int:
    return int(getattr(image, "n_frames", 1))


def _read_pages(data: bytes, format: PixelFormat) -> np.ndarray:
    """Reads a TIFF file with one page per channel."""
    image, pages = open_image(data), []
    for page in range(format.channels):
        image.seek(page)
        _check_all(*image.size, format.channels * np.dtype(format.dtype).itemsize)
        image.load()
        values = np.asarray(image.convert("L") if image.mode == "1" else image)
        pages.append(values.astype(values.dtype.newbyteorder("=")))
    if any(page.ndim != 2 or page.shape != pages[0].shape or page.dtype != pages[0].dtype for page in pages):
        raise BadImage(f"a TIFF file whose pages are not {format.channels} channels of one image", OTHER_CHANNELS)
    return np.stack(pages, axis=2)


def _read_tiff(data: bytes, refused: BadImage) -> np.ndarray:
    """Reads the first page of a TIFF file that Pillow cannot read: of more channels, or of floating point.

    Args:
        refused: why Pillow cannot read it.
    """
    try:
        import tifffile
    except ImportError:
        raise BadImage(
            f'{refused}; tifffile reads more TIFF files: pip install "lomar-deepspeed[tiff]"', UNSUPPORTED
        ) from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs a line for each damaged file
    with tifffile.TiffFile(BytesIO(data)) as file:
        if not len(file.pages):
            raise BadImage("a TIFF file without an image")
        page: Any = file.pages[0]
        _check_all(page.imagewidth, page.imagelength, page.nbytes // max(page.imagewidth * page.imagelength, 1))
        if page.imagedepth != 1 or page.samplesperpixel > MAX_CHANNELS:
            raise BadImage(
                f"a TIFF file with {page.samplesperpixel} channels, {page.imagedepth} layers", OTHER_CHANNELS
            )
        if page.dtype is None or page.dtype.name not in get_args(DType):
            raise BadImage(f"a TIFF file of dtype {page.dtype}: convert it to uint8, uint16 or float32", UNSUPPORTED)
        if page.photometric not in _MEANINGS or page.tags.valueof(_ORIENTATION, 1) != 1:
            raise BadImage(
                "a TIFF file that is not gray or RGB, has 0 as white, or is rotated: save it upright", UNSUPPORTED
            )
        _check_compression(page, data)
        values: np.ndarray = page.asarray(maxworkers=1)
        if page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
            values = np.moveaxis(values, 0, -1)
    return np.ascontiguousarray(values)


def _check_compression(page: Any, data: bytes) -> None:
    """Raises BadImage if the compression is not supported, or if the data unpack to more than the image's size."""
    if page.compression not in _COMPRESSIONS:
        raise BadImage(
            f"a TIFF file with {page.compression.name} compression: save it uncompressed, or with deflate", UNSUPPORTED
        )
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        if page.compression != 1:
            unpacked = zlib.decompressobj().decompress(data[offset : offset + count], page.nbytes + 1)
            if len(unpacked) > page.nbytes:
                raise BadImage("a TIFF file that decompresses to more than an image of its size")
