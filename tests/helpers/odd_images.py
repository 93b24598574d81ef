"""Malformed or unusual image files, each with the expected outcome; they are small and deterministic."""

import gzip
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data.image_file import DAMAGED, EMPTY, MAX_PIXELS, NO_IMAGE, READS_HEIC, TOO_LARGE, TOO_SMALL, UNSUPPORTED
from helpers.shard_tools import encode, smooth_image

READ = ""
EITHER = "either"  # read or rejected, as the decoder decides, but the same in all places
HUGE = 60_000
FORMATS = {
    "jpg": ("JPEG", {"quality": 90}),
    "progressive.jpg": ("JPEG", {"progressive": True}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {}),
    "lossless.webp": ("WEBP", {"lossless": True}),
    "bmp": ("BMP", {}),
    "tif": ("TIFF", {}),
    "lzw.tif": ("TIFF", {"compression": "tiff_lzw"}),
    "gif": ("GIF", {}),
    "jp2": ("JPEG2000", {}),
    "avif": ("AVIF", {}),
    **({"heic": ("HEIF", {})} if READS_HEIC else {}),
}
MODES = {
    "png": ("1", "L", "LA", "P", "RGBA", "I;16"),
    "jpg": ("L", "CMYK"),
    "webp": ("RGBA",),
    "bmp": ("1", "L", "P"),
    "tif": ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "YCbCr"),
    "gif": ("1", "L", "P", "RGBA"),
    "jp2": ("L", "LA", "RGBA", "I;16"),
    "avif": ("L", "RGBA"),
    **({"heic": ("L", "RGBA")} if READS_HEIC else {}),
}


class OddImage(NamedTuple):
    """A file and its expected outcome."""

    name: str
    data: bytes
    kind: str
    """Why it is refused: a kind of `data.image_file`; READ if it is not, EITHER if that is for the decoder to say."""


def photo(mode: str = "RGB", width: int = 64, height: int = 48) -> Image.Image:
    """Make an image in any of Pillow's modes that files can have."""
    image = smooth_image(7, width, height)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode in ("LA", "RGBA"):
        image = image.convert(mode)
        image.putalpha(Image.linear_gradient("L").resize((width, height)))
        return image
    return image.convert(mode)


def odd_images() -> Iterator[OddImage]:
    """Yield all files; names are unique even without suffix, and none needs more than a few megabytes."""
    for part in (_modes, _truncated, _no_images, _sizes, _pictures, _turned, _png, _jpeg, _tiff, _others, _flipped):
        for name, (data, kind) in part().items():
            key, _, suffix = name.rpartition(".")
            key = f"{part.__name__[1:]}-{key}-{suffix}".replace(".", "-").replace(";", "")
            yield OddImage(f"{key}.{suffix}", data, kind)


Files = dict[str, tuple[bytes, str]]


def _modes() -> Files:
    files = {
        f"{mode}.{suffix}": (encode(photo(mode), FORMATS[suffix][0]), READ)
        for suffix, modes in MODES.items()
        for mode in modes
    }
    files["LAB.tif"] = encode(Image.new("LAB", (64, 48)), "TIFF"), UNSUPPORTED
    files["float.tif"] = encode(Image.new("F", (64, 48), 0.5), "TIFF"), UNSUPPORTED
    files["signed.tif"] = encode(Image.new("I", (64, 48), -5), "TIFF"), UNSUPPORTED
    files["palette-transparent.png"] = encode(photo("P"), "PNG", transparency=bytes(range(200))), READ
    files["color-key.png"] = encode(photo(), "PNG", transparency=(1, 2, 3)), READ
    files["packbits.tif"] = encode(photo(), "TIFF", compression="packbits"), READ
    files["deflate.tif"] = encode(photo(), "TIFF", compression="tiff_adobe_deflate"), READ
    files["jpeg.tif"] = encode(photo(), "TIFF", compression="jpeg"), READ
    files["group4.tif"] = encode(photo("1"), "TIFF", compression="group4"), READ
    files["big.tif"] = encode(photo(), "TIFF", big_tiff=True), READ
    for channels, name in ((2, "gray-alpha"), (3, "color"), (4, "color-alpha")):
        files[f"16-bit-{name}.png"] = png_16(ramp_16(channels)), READ
        if channels > 2:
            for order in "<>":
                files[f"16-bit-{name}-{'II' if order == '<' else 'MM'}.tif"] = tiff_16(ramp_16(channels), order), READ
    return files


def _truncated() -> Files:
    files = {}
    for suffix, (format, options) in FORMATS.items():
        data = encode(photo(), format, **options)
        first = DAMAGED if format in ("JPEG", "PNG", "TIFF", "GIF") else NO_IMAGE  # four bytes identify the format
        cuts = {0: EMPTY, 1: NO_IMAGE, 4: first if format != "PNG" else NO_IMAGE, 24: DAMAGED}
        cuts |= {len(data) * part // 8: DAMAGED for part in (2, 4, 6)}
        files |= {f"{cut}.{suffix}": (data[:cut], kind) for cut, kind in cuts.items()}
        files[f"last-byte.{suffix}"] = data[:-1], EITHER
        files[f"half-zeros.{suffix}"] = data[: len(data) // 2] + bytes(len(data) - len(data) // 2), EITHER
        files[f"rest.{suffix}"] = data + b"rubbish" * 30, READ
    return files


def _no_images() -> Files:
    jpeg = encode(photo(), "JPEG")
    return {
        "zeros.jpg": (bytes(5000), NO_IMAGE),
        "ones.jpg": (b"\xff" * 5000, NO_IMAGE),
        "noise.jpg": (np.random.default_rng(0).bytes(5000), NO_IMAGE),
        "text.png": (b"not found\n" * 30, NO_IMAGE),
        "html.jpg": (b"<!DOCTYPE html><html>404</html>" * 20, NO_IMAGE),
        "utf-16.jpg": ("no image".encode("utf-16") * 20, NO_IMAGE),
        "lfs.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n", NO_IMAGE),
        "gzip.jpg": (gzip.compress(jpeg, mtime=0), NO_IMAGE),
        "line-ends.png": (encode(photo(), "PNG").replace(b"\r\n", b"\n"), NO_IMAGE),  # as left by FTP's text mode
        "zip.png": (b"PK\x03\x04" + bytes(200), NO_IMAGE),
        "pdf.jpg": (b"%PDF-1.7\n" + jpeg, NO_IMAGE),
        "svg.png": (b"<svg xmlns='http://www.w3.org/2000/svg' width='64' height='64'/>", NO_IMAGE),
        "elf.bmp": (b"\x7fELF" + bytes(200), NO_IMAGE),
        "icon.png": (encode(photo(), "ICO"), NO_IMAGE),
        "tga.jpg": (encode(photo(), "TGA"), NO_IMAGE),
        "ppm.png": (encode(photo(), "PPM"), NO_IMAGE),
        "heic.jpg": (bytes(3) + b"\x18ftypheic" + bytes(40), DAMAGED if READS_HEIC else UNSUPPORTED),
        "heif.png": (bytes(3) + b"\x18ftypmsf1" + bytes(40), DAMAGED if READS_HEIC else UNSUPPORTED),
        "avif-brand-alone.avif": (bytes(3) + b"\x18ftypavif" + bytes(40), DAMAGED),
        "space-in-front.jpg": (b"\n" + jpeg, NO_IMAGE),
        "png-in-jpg.jpg": (encode(photo(), "PNG"), READ),
        "jpg-in-tif.tif": (jpeg, READ),
        "webp-in-png.png": (encode(photo(), "WEBP"), READ),
    }


def _sizes() -> Files:
    """Decompression bombs, which are huge according to their header, and tiny or thin images."""
    jpeg, png, gif, bmp = (encode(photo(), format) for format in ("JPEG", "PNG", "GIF", "BMP"))
    webp, tif, jp2, avif = (encode(photo(), format) for format in ("WEBP", "TIFF", "JPEG2000", "AVIF"))
    sof = jpeg.index(b"\xff\xc0") + 5
    box, ispe = jp2.index(b"ihdr") + 4, avif.index(b"ispe") + 8
    vp8x = b"VP8X" + struct.pack("<IIHBHB", 10, 0x10, 0x3FFF, 0, 0x3FFF, 0)
    files = {
        "huge.jpg": (jpeg[:sof] + struct.pack(">HH", HUGE, HUGE) + jpeg[sof + 4 :], TOO_LARGE),
        "huge.png": (with_ihdr(png, HUGE, HUGE), TOO_LARGE),
        "largest.png": (with_ihdr(png, 2**31 - 1, 2**31 - 1), TOO_LARGE),
        "over-the-limit.png": (with_ihdr(png, MAX_PIXELS // 10_000 + 1, 10_000), TOO_LARGE),
        "huge.gif": (gif[:6] + struct.pack("<HH", HUGE, HUGE) + gif[10:], TOO_LARGE),
        "huge.bmp": (bmp[:18] + struct.pack("<ii", HUGE, HUGE) + bmp[26:], TOO_LARGE),
        "huge-upwards.bmp": (bmp[:18] + struct.pack("<ii", HUGE, -HUGE) + bmp[26:], TOO_LARGE),
        "huge.tif": (with_tags(tif, {256: HUGE, 257: HUGE}), TOO_LARGE),
        "huge.jp2": (jp2[:box] + struct.pack(">II", HUGE, HUGE) + jp2[box + 8 :], EITHER),
        "huge.avif": (avif[:ispe] + struct.pack(">II", HUGE, HUGE) + avif[ispe + 8 :], EITHER),
        "huge-canvas.webp": (webp[:12] + vp8x + webp[12:], EITHER),
        "no-width.jpg": (jpeg[:sof] + struct.pack(">HH", 48, 0) + jpeg[sof + 4 :], DAMAGED),
        "no-height.jpg": (jpeg[:sof] + struct.pack(">HH", 0, 64) + jpeg[sof + 4 :], DAMAGED),
        "no-width.png": (with_ihdr(png, 0, 48), EITHER),
        "no-width.gif": (gif[:6] + struct.pack("<HH", 0, 0) + gif[10:], EITHER),
        "no-width.bmp": (bmp[:18] + struct.pack("<ii", 0, 48) + bmp[26:], EITHER),
        "no-width.tif": (with_tags(tif, {256: 0}), EITHER),
        "taller-than-its-data.jpg": (jpeg[:sof] + struct.pack(">HH", 480, 64) + jpeg[sof + 4 :], EITHER),
        "taller-than-its-data.png": (with_ihdr(png, 64, 480), READ),
        "taller-than-its-data.bmp": (bmp[:18] + struct.pack("<ii", 64, 480) + bmp[26:], DAMAGED),
        "lower-than-its-data.png": (with_ihdr(png, 64, 12), READ),
        "dot.png": (encode(photo(width=1, height=1), "PNG"), TOO_SMALL),
        "dot.gif": (encode(photo("P", 1, 1), "GIF"), TOO_SMALL),
        "line.jpg": (encode(photo(width=300, height=7), "JPEG"), TOO_SMALL),
        "smallest.jpg": (encode(photo(width=8, height=8), "JPEG"), READ),
        "thin.jpg": (encode(photo(width=8, height=3000), "JPEG"), READ),
        "wide.png": (encode(photo(width=3000, height=8), "PNG"), READ),
        "flood.png": (png_of(chunk(b"IHDR", ihdr(64, 48)), chunk(b"IDAT", zlib.compress(bytes(20_000_000)))), READ),
        "text-bomb.png": (with_chunk(png, b"zTXt", b"x\0\0" + zlib.compress(bytes(101 << 20), 1)), DAMAGED),
    }
    for suffix, (format, options) in FORMATS.items():
        files[f"large-for-its-crop.{suffix}"] = encode(photo(width=400, height=300), format, **options), READ
    return files


def _pictures() -> Files:
    """Files with several pictures, of which the first counts."""
    files = {}
    others = [smooth_image(seed, 64, 48) for seed in (1, 2)]
    for suffix, format in {"gif": "GIF", "webp": "WEBP", "png": "PNG", "tif": "TIFF", "avif": "AVIF"}.items():
        data = without_times(encode(photo(), format, save_all=True, append_images=others))
        files[f"three.{suffix}"] = data, READ
        files[f"second-damaged.{suffix}"] = data[: len(data) * 2 // 3], EITHER if suffix in ("webp", "avif") else READ
        files[f"third-damaged.{suffix}"] = data[: len(data) - 9], EITHER
    files["second-damaged.tif"] = files["second-damaged.tif"][0], EITHER
    files["previews.jpg"] = encode(photo(), "MPO", save_all=True, append_images=others), READ
    mpo = files["previews.jpg"][0]
    files["previews-cut.jpg"] = mpo[: len(mpo) - 500], EITHER
    return files


def _turned() -> Files:
    """Images rotated by EXIF, and images with damaged EXIF."""
    files = {}
    for suffix in ("jpg", "png", "webp", "tif", "avif"):
        for orientation in (3, 6, 8, 99):
            exif = Image.Exif()
            exif[274] = orientation
            files[f"{orientation}.{suffix}"] = encode(photo(), FORMATS[suffix][0], exif=exif.tobytes()), READ
    for suffix in ("jpg", "png", "webp"):
        broken = b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xff" * 40
        files[f"broken.{suffix}"] = encode(photo(), FORMATS[suffix][0], exif=broken), READ
    return files


def _png() -> Files:
    png = encode(photo(), "PNG")
    header, end = chunk(b"IHDR", ihdr(64, 48)), chunk(b"IEND", b"")
    pixels = chunk(b"IDAT", zlib.compress(bytes((64 * 3 + 1) * 48)))
    note = PngInfo()
    note.add_text("history", "edited " * 300_000, zip=True)
    damaged = bytearray(png)
    damaged[png.index(b"IDAT") + 60] ^= 255
    return {
        "no-end.png": (png[: -len(end)], EITHER),
        "no-pixels.png": (png_of(header), DAMAGED),
        "no-header.png": (png_of(pixels), DAMAGED),
        "no-palette.png": (png_of(chunk(b"IHDR", ihdr(64, 48, color=3)), pixels), EITHER),
        "two-headers.png": (png_of(header, header, pixels), EITHER),
        "unknown-color.png": (png_of(chunk(b"IHDR", ihdr(64, 48, color=5)), pixels), DAMAGED),
        "unknown-depth.png": (png_of(chunk(b"IHDR", ihdr(64, 48, depth=7)), pixels), DAMAGED),
        "unknown-filter.png": (png_of(header, chunk(b"IDAT", zlib.compress(b"\x09" * 193 * 48))), EITHER),
        "no-zlib.png": (png_of(header, chunk(b"IDAT", b"pixels" * 50)), DAMAGED),
        "unknown-chunk.png": (with_chunk(png, b"abCd", b"?" * 30), READ),
        "critical-chunk.png": (with_chunk(png, b"ABCD", b"?" * 30), EITHER),
        "chunk-of-four-gigabytes.png": (png[:33] + struct.pack(">I", 2**32 - 1) + b"tEXt" + png[33:], DAMAGED),
        "checksum-of-header.png": (png[:30] + b"\0" + png[31:], EITHER),
        "checksum-of-text.png": (png[:33] + chunk(b"tEXt", b"a\0b")[:-1] + b"?" + png[33:], EITHER),
        "damaged-pixels.png": (bytes(damaged), EITHER),
        "interlaced.png": (png_of(chunk(b"IHDR", ihdr(64, 48, interlaced=1)), pixels), EITHER),
        "long-text.png": (encode(photo(), "PNG", pnginfo=note), READ),
        "long-profile.png": (encode(photo(), "PNG", icc_profile=bytes(2_000_000)), READ),
        "broken-profile.png": (with_chunk(png, b"iCCP", b"name\0\0" + b"profile" * 9), EITHER),
    }


def _jpeg() -> Files:
    jpeg = encode(photo(width=200, height=150), "JPEG", quality=90)
    scan = jpeg.index(b"\xff\xda")
    tables = jpeg.index(b"\xff\xc4")
    quarter = scan + (len(jpeg) - scan) // 4
    sof = jpeg.index(b"\xff\xc0")
    cmyk = encode(photo("CMYK"), "JPEG")
    return {
        "no-scan.jpg": (jpeg[:scan] + b"\xff\xd9", DAMAGED),
        "no-end.jpg": (jpeg[:-2], EITHER),
        "no-huffman-tables.jpg": (jpeg[:tables] + jpeg[scan:], EITHER),
        "zeros-amid.jpg": (jpeg[:quarter] + bytes(300) + jpeg[quarter + 300 :], EITHER),
        "ones-amid.jpg": (jpeg[:quarter] + b"\xff" * 300 + jpeg[quarter + 300 :], EITHER),
        "hole.jpg": (jpeg[:quarter] + jpeg[quarter + 700 :], EITHER),
        "end-amid.jpg": (jpeg[:quarter] + b"\xff\xd9" + jpeg[quarter:], EITHER),
        "two.jpg": (jpeg + cmyk, READ),
        "start-twice.jpg": (b"\xff\xd8" + jpeg, EITHER),
        "five-channels.jpg": (jpeg[: sof + 9] + b"\x05" + jpeg[sof + 10 :], DAMAGED),
        "lossless.jpg": (jpeg[:sof] + b"\xff\xc3" + jpeg[sof + 2 :], EITHER),
        "arithmetic.jpg": (jpeg[:sof] + b"\xff\xc9" + jpeg[sof + 2 :], EITHER),
        "twelve-bits.jpg": (jpeg[: sof + 4] + b"\x0c" + jpeg[sof + 5 :], DAMAGED),
        "segment-too-long.jpg": (jpeg[:2] + b"\xff\xe5\xff\xff" + jpeg[2:], DAMAGED),
        "comment-of-60-kilobytes.jpg": (
            jpeg[:2] + b"\xff\xfe" + struct.pack(">H", 60_002) + bytes(60_000) + jpeg[2:],
            READ,
        ),
        "fill-bytes.jpg": (jpeg[:2] + b"\xff" * 20 + jpeg[2:], READ),
        "adobe-marker-cut.jpg": (jpeg[:2] + b"\xff\xee\0\x08Adobe\0" + jpeg[2:], DAMAGED),
        "cmyk-cut.jpg": (cmyk[: len(cmyk) // 2], DAMAGED),
        "subsampled.jpg": (encode(photo(), "JPEG", subsampling="4:1:1"), READ),
        "restarts.jpg": (encode(photo(), "JPEG", restart_marker_rows=1), READ),
        "rgb.jpg": (encode(photo(), "JPEG", keep_rgb=True), READ),
        "best.jpg": (encode(photo(), "JPEG", quality=100, subsampling=0), READ),
    }


def _tiff() -> Files:
    tif = encode(photo(), "TIFF")
    ifd = struct.unpack("<I", tif[4:8])[0]
    count = struct.unpack("<H", tif[ifd : ifd + 2])[0]
    following = ifd + 2 + 12 * count
    return {
        "directory-beyond-the-end.tif": (tif[:4] + struct.pack("<I", 2**31) + tif[8:], DAMAGED),
        "directory-at-zero.tif": (tif[:4] + bytes(4) + tif[8:], DAMAGED),
        "directory-that-follows-itself.tif": (
            tif[:following] + struct.pack("<I", ifd) + tif[following + 4 :],
            READ,
        ),
        "directory-of-65535-tags.tif": (tif[:ifd] + b"\xff\xff" + tif[ifd + 2 :], EITHER),
        "strip-beyond-the-end.tif": (with_tags(tif, {273: 2**30}), DAMAGED),
        "strip-without-bytes.tif": (with_tags(tif, {279: 0}), EITHER),
        "strip-of-four-gigabytes.tif": (with_tags(tif, {279: 2**32 - 1}), EITHER),
        "no-rows-in-a-strip.tif": (with_tags(tif, {278: 0}), EITHER),
        "unknown-compression.tif": (with_tags(tif, {259: 77}), EITHER),
        "wrong-compression.tif": (with_tags(tif, {259: 5}), EITHER),
        "unknown-photometric.tif": (with_tags(tif, {262: 99}), DAMAGED),
        "six-channels.tif": (with_tags(tif, {277: 6}), DAMAGED),
        "channels-in-planes.tif": (with_tags(tif, {284: 2}), EITHER),
        "list-of-four-billion-values.tif": (with_tags(tif, {273: 8}, count=2**32 - 1), EITHER),
    }


def _others() -> Files:
    gif, bmp, webp, jp2, avif = (encode(photo(), format) for format in ("GIF", "BMP", "WEBP", "JPEG2000", "AVIF"))
    frame = gif.rindex(b"\x2c\0\0\0\0") + 1
    upside = np.asarray(photo())[::-1]
    code, codestream = avif.index(b"av1C"), jp2.index(b"\xff\x4f\xff\x51")
    return {
        "no-frame.gif": (gif[: frame - 1] + b"\x3b", DAMAGED),
        "frame-beyond-the-canvas.gif": (gif[:frame] + struct.pack("<HH", 90, 90) + gif[frame + 4 :], EITHER),
        "frame-far-beyond.gif": (gif[:frame] + struct.pack("<HHHH", HUGE, HUGE, 5, 5) + gif[frame + 8 :], EITHER),
        "code-size.gif": (gif[: frame + 9 + 768] + b"\x0f" + gif[frame + 10 + 768 :], EITHER),
        "interlaced.gif": (encode(photo("P"), "GIF", interlace=1), READ),
        "transparent.gif": (encode(photo("P"), "GIF", transparency=3), READ),
        "old.gif": (b"GIF87a" + gif[6:], READ),
        "from-the-top.bmp": (bmp[:22] + struct.pack("<i", -48) + bmp[26:], READ),
        "pixels-beyond-the-end.bmp": (bmp[:10] + struct.pack("<I", 2**31) + bmp[14:], DAMAGED),
        "header-of-unknown-length.bmp": (bmp[:14] + struct.pack("<I", 77) + bmp[18:], EITHER),
        "77-bits.bmp": (bmp[:28] + struct.pack("<H", 77) + bmp[30:], EITHER),
        "unknown-compression.bmp": (bmp[:30] + struct.pack("<I", 77) + bmp[34:], EITHER),
        "flipped.bmp": (encode(Image.fromarray(upside), "BMP"), READ),
        "length-too-long.webp": (webp[:4] + struct.pack("<I", 2**31) + webp[8:], EITHER),
        "length-too-short.webp": (webp[:4] + struct.pack("<I", 100) + webp[8:], EITHER),
        "unknown-chunk.webp": (webp[:12] + b"ABCD" + struct.pack("<I", 4) + b"data" + webp[12:], EITHER),
        "no-configuration.avif": (avif[:code] + b"free" + avif[code + 4 :], EITHER),
        "codestream.jp2": (jp2[codestream:], READ),
        "no-codestream.jp2": (jp2[:codestream], DAMAGED),
        "not-reversible.jp2": (encode(photo(), "JPEG2000", irreversible=True, quality_layers=[20]), READ),
        "tiled.jp2": (encode(photo(), "JPEG2000", tile_size=(32, 32)), READ),
    }


def _flipped() -> Files:
    """Files with flipped bits."""
    rng, files = np.random.default_rng(0), {}
    for suffix, (format, options) in FORMATS.items():
        data = encode(photo(), format, **options)
        for number in range(6):
            damaged = bytearray(data)
            for position in rng.integers(0, len(data), 4):
                damaged[position] ^= 1 << int(rng.integers(8))
            files[f"{number}.{suffix}"] = bytes(damaged), EITHER
    return files


def ramp_16(channels: int, white: int = 65535) -> np.ndarray:
    """Return uint16 (48, 64, channels) from 0 to `white` with varying low bytes."""
    values = np.linspace(0, white, 48 * 64 * channels).astype(np.uint16)
    return values.reshape(48, 64, channels)


def chunk(kind: bytes, content: bytes) -> bytes:
    """Encode a PNG chunk."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def ihdr(width: int, height: int, depth: int = 8, color: int = 2, interlaced: int = 0) -> bytes:
    """Encode the content of a PNG header."""
    return struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)


def png_of(*chunks: bytes) -> bytes:
    """Encode a PNG of these chunks and the end chunk."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def png_16(values: np.ndarray) -> bytes:
    """Encode uint16 (H, W, 2 to 4) as PNG, which Pillow cannot do."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = ihdr(width, height, 16, {2: 4, 3: 2, 4: 6}[channels])
    return png_of(chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)))


def with_ihdr(png: bytes, width: int, height: int) -> bytes:
    """Replace the size in a PNG's header."""
    return png[:8] + chunk(b"IHDR", struct.pack(">II", width, height) + png[24:29]) + png[33:]


def with_chunk(png: bytes, kind: bytes, content: bytes) -> bytes:
    """Insert a chunk after a PNG's header."""
    return png[:33] + chunk(kind, content) + png[33:]


def tiff_16(values: np.ndarray, order: str = "<") -> bytes:
    """Encode uint16 (H, W, 3 or 4) as uncompressed TIFF, which Pillow cannot do."""
    height, width, channels = values.shape
    pixels = values.astype(f"{order}u2").tobytes()
    depths = 8 + len(pixels)
    tags = {256: width, 257: height, 258: depths, 259: 1, 262: 2, 273: 8, 277: channels, 278: height, 279: len(pixels)}
    if channels == 4:
        tags[338] = 2
    entries = b"".join(
        struct.pack(f"{order}HHII", tag, 3, channels, value)
        if tag == 258
        else struct.pack(f"{order}HHII", tag, 4, 1, value)
        for tag, value in tags.items()
    )
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, depths + 2 * channels)
    return start + pixels + struct.pack(f"{order}{channels}H", *[16] * channels) + directory


def without_times(avif: bytes) -> bytes:
    """Clear the timestamps of an AVIF sequence (ISO/IEC 14496-12, version 1 of the three boxes)."""
    changed = bytearray(avif)
    for box in (b"mvhd", b"tkhd", b"mdhd") if avif[8:12] == b"avis" else ():
        place = avif.index(box) + 8
        changed[place : place + 16] = bytes(16)
    return bytes(changed)


def with_tags(tif: bytes, values: dict[int, int], count: int = 1) -> bytes:
    """Replace values in the first directory of a little-endian TIFF."""
    changed = bytearray(tif)
    ifd = struct.unpack("<I", tif[4:8])[0]
    for number in range(struct.unpack("<H", tif[ifd : ifd + 2])[0]):
        entry = ifd + 2 + 12 * number
        tag = struct.unpack("<H", tif[entry : entry + 2])[0]
        if tag in values:
            changed[entry + 2 : entry + 12] = struct.pack("<HII", 4, count, values[tag])
    return bytes(changed)
