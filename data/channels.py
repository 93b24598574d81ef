"""Bytes of an image file -> pixels of any number of channels, as they are in the file.

RGB of 8 bits, what photographs are, is ``decode``'s own affair: it makes RGB of grays, palettes and CMYK. Here a file
must have the channels and the type that are asked for; only three channels of 16 bits are made of grays in the same
way, and lose their transparency.
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
_MAX_HEADER = 4096  # bytes; of an array without fields a hundred
_COMPRESSIONS = (1, 8, 32946)  # none, deflate by its two numbers
_MEANINGS, _ORIENTATION = (1, 2), 274  # numbers of which 0 is black, or RGB; a tag
_BITS_PER_SAMPLE, _SAMPLES_PER_PIXEL, _PLANES = 258, 277, 284  # TIFF 6.0, sections 4, 6 and 8
_HEADER = re.compile(
    rb"\{\s*'descr':\s*'([^'\\]{1,20})',\s*'fortran_order':\s*(True|False),\s*"
    rb"'shape':\s*\((\d{1,9}),\s*(\d{1,9})(?:,\s*(\d{1,9}))?,?\s*\),?\s*\}\s*"
)


def is_npy(data: bytes) -> bool:
    """Whether these bytes begin as a .npy file."""
    return data.startswith(NPY)


def read_pixels(data: bytes, format: PixelFormat) -> np.ndarray:
    """All pixels of a file.

    Args:
        data: a PNG, TIFF or another image, or a .npy file with an array (H, W, C), or (H, W) of one channel.
        format: that they must have.

    Returns:
        (H, W, C) of the format's type, in the machine's byte order.

    Raises:
        BadImage: as ``decode``, or other channels or another type. No other exception, whatever the bytes.
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
        raise BadImage("values that are not finite: fill in what is missing, or leave the image out")
    return values


def read_npy(data: bytes) -> np.ndarray:
    """The array of a .npy file, (H, W) or (H, W, C), without NumPy's reader, which can unpickle.

    The header is believed only where its shape and type are those of an image and make exactly the bytes behind it.

    Raises:
        BadImage: anything else.
    """
    start = 10 if data[6:7] == b"\x01" else 12  # version 1 has a length of two bytes
    length = int.from_bytes(data[8:start], "little")
    if data[6:7] not in (b"\x01", b"\x02", b"\x03") or length > _MAX_HEADER or len(data) < start + length:
        raise BadImage(
            f"a .npy file whose header is damaged, or has {length} bytes where up to {_MAX_HEADER} are usual"
        )
    header = _HEADER.fullmatch(data[start : start + length])
    if header is None:
        raise BadImage("a .npy file of something else than an array (height, width, channels) of numbers", UNSUPPORTED)
    descr, fortran, *sides = (part.decode() if part else "" for part in header.groups())
    shape = tuple(int(side) for side in sides if side)
    if descr not in ("|u1", "<u2", ">u2", "<f4", ">f4"):
        raise BadImage(f"a .npy file of {descr}: save uint8, uint16 or float32", UNSUPPORTED)
    if len(shape) == 3 and shape[2] > MAX_CHANNELS >= shape[0]:
        raise BadImage(f"a .npy file of {shape}: save it as (height, width, channels)", OTHER_CHANNELS)
    check_size(shape[1], shape[0])
    dtype = np.dtype(descr)
    expected, given = math.prod(shape) * dtype.itemsize, len(data) - start - length
    if expected != given:
        raise BadImage(f"a .npy file with {given} bytes of values, where its header says {expected}")
    values = np.frombuffer(data, dtype, offset=start + length).reshape(shape, order="F" if fortran == "True" else "C")
    return np.ascontiguousarray(values, dtype.newbyteorder("="))


def _read_image(data: bytes, format: PixelFormat) -> np.ndarray:
    """The pixels of any other file, as they are in it: (H, W) or (H, W, C)."""
    try:
        image = open_image(data)
    except BadImage as error:
        if not is_tiff(data) or error.kind not in (DAMAGED, UNSUPPORTED):
            raise
        return _read_tiff(data, error)
    if is_tiff(data) and format.channels != 3 and _pages(image) == format.channels > 1:
        return _read_pages(data, format)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and (lost := _lost(image)):
        return _read_tiff(data, BadImage(f"a TIFF file of which Pillow loses {lost}", UNSUPPORTED))
    values = read_16_bits(image, alpha=format.channels != 3)
    if values is not None:
        if is_negative(image):
            values = np.subtract(white_of(image), values, dtype=np.uint16)
        return np.repeat(values[..., None], 3, axis=2) if values.ndim == 2 and format.channels == 3 else values
    if image.format == "AVIF" or (image.format == "JPEG2000" and image.mode != "L"):
        raise BadImage(f"{image.format}, of which Pillow keeps 8 bits: convert it to PNG or TIFF", UNSUPPORTED)
    return _read_8_bits(image, format)


def _read_8_bits(image: Image.Image, format: PixelFormat) -> np.ndarray:
    if format.channels == 3 or image.mode in ("CMYK", "YCbCr"):  # these mean colors
        return np.asarray(to_rgb(image))
    if image.mode == "P":
        return np.asarray(image.convert("RGBA" if "transparency" in image.info else "RGB"))
    return np.asarray(image.convert("L") if image.mode == "1" else image)


def _check_all(width: int, height: int, pixel: int) -> None:
    """Raises BadImage for sizes that are not read, and for more bytes in all, of so many a pixel, than files have."""
    check_size(width, height)
    if width * height * pixel > MAX_BYTES:
        raise BadImage(f"{width} x {height} pixels of {pixel} bytes are over {MAX_BYTES}: cut it into parts", TOO_LARGE)


def _lost(image: TiffImagePlugin.TiffImageFile) -> str:
    """What Pillow would not read of a TIFF file, in words; '' where it reads all."""
    samples = image.tag_v2.get(_SAMPLES_PER_PIXEL, 1)
    if samples != len(image.getbands()):
        return "channels"
    is_wide = max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,))) > 8
    whole = image.mode.startswith("I;16") or has_16_bit_colors(image)
    return "bits" if is_wide and (not whole or (samples > 1 and image.tag_v2.get(_PLANES, 1) != 1)) else ""


def _pages(image: Image.Image) -> int:
    return int(getattr(image, "n_frames", 1))


def _read_pages(data: bytes, format: PixelFormat) -> np.ndarray:
    """A TIFF file with as many pages as there are channels, of one channel each."""
    image, pages = open_image(data), []
    for page in range(format.channels):
        image.seek(page)
        _check_all(*image.size, format.channels * np.dtype(format.dtype).itemsize)
        image.load()
        values = np.asarray(image.convert("L") if image.mode == "1" else image)
        pages.append(values.astype(values.dtype.newbyteorder("=")))
    if any(page.ndim != 2 or page.shape != pages[0].shape or page.dtype != pages[0].dtype for page in pages):
        raise BadImage(f"a TIFF file whose pages are not the {format.channels} channels of an image", OTHER_CHANNELS)
    return np.stack(pages, axis=2)


def _read_tiff(data: bytes, refused: BadImage) -> np.ndarray:
    """The first page of a TIFF file that Pillow does not read: of more channels, or of floating point.

    Args:
        refused: why Pillow does not.
    """
    try:
        import tifffile
    except ImportError:
        raise BadImage(
            f'{refused}; TIFF files of other channels need tifffile: pip install "lomar-deepspeed[tiff]"', UNSUPPORTED
        ) from None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # a line for each damaged file
    with tifffile.TiffFile(BytesIO(data)) as file:
        if not len(file.pages):
            raise BadImage("a TIFF file without an image")
        page: Any = file.pages[0]
        _check_all(page.imagewidth, page.imagelength, page.nbytes // max(page.imagewidth * page.imagelength, 1))
        if page.imagedepth != 1 or page.samplesperpixel > MAX_CHANNELS:
            raise BadImage(f"a TIFF file of {page.samplesperpixel} channels, {page.imagedepth} layers", OTHER_CHANNELS)
        if page.dtype is None or page.dtype.name not in get_args(DType):
            raise BadImage(f"a TIFF file of {page.dtype}: convert it to uint8, uint16 or float32", UNSUPPORTED)
        if page.photometric not in _MEANINGS or page.tags.valueof(_ORIENTATION, 1) != 1:
            raise BadImage("a TIFF file of other colors, with 0 as white, or turned: save it upright", UNSUPPORTED)
        _check_compression(page, data)
        values: np.ndarray = page.asarray(maxworkers=1)
        if page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
            values = np.moveaxis(values, 0, -1)
    return np.ascontiguousarray(values)


def _check_compression(page: Any, data: bytes) -> None:
    """Raises BadImage where it is not one that is read, or where what it unpacks to is larger than the image."""
    if page.compression not in _COMPRESSIONS:
        raise BadImage(
            f"a TIFF file compressed by {page.compression.name}: save it uncompressed, or by deflate", UNSUPPORTED
        )
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        if page.compression != 1:
            unpacked = zlib.decompressobj().decompress(data[offset : offset + count], page.nbytes + 1)
            if len(unpacked) > page.nbytes:
                raise BadImage("a TIFF file that unpacks to more than an image of its size")
