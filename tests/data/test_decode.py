import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torchvision.transforms.functional as F
from helpers.odd_images import png_16, ramp_16, tiff_16
from helpers.shard_tools import encode, jpeg, smooth_image
from PIL import Image
from PIL.Image import Resampling
from PIL.PngImagePlugin import PngInfo
from torchvision.transforms import InterpolationMode

from data import decode as decoding
from data.decode import Crop, decode, decode_crops
from data.image_facts import check_image, rewrite_16_bits
from data.image_file import FORMATS, BadImage
from data.transforms import Box, random_resized_crop


def whole(width: int, height: int) -> Box:
    return 0, 0, width, height


def reference(image: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    """The usual way: decode the whole image, crop, resize."""
    left, top, right, bottom = box
    crop = F.resized_crop(
        image.convert("RGB"),
        top,
        left,
        bottom - top,
        right - left,
        list(size),
        InterpolationMode.BICUBIC,
        antialias=True,
    )
    return np.asarray(crop).astype(int)


@pytest.mark.parametrize("format", FORMATS)
def test_whole_image_matches_torchvision(format: str) -> None:
    data = encode(smooth_image(0, 150, 110), format)
    from_file = Image.open(io.BytesIO(data))
    ours = decode(data, whole, (64, 96))
    assert ours.dtype == np.uint8
    assert ours.shape == (64, 96, 3)
    theirs = reference(from_file, (0, 0, 150, 110), (64, 96))
    assert abs(ours - theirs).max() <= 3
    assert abs(ours - theirs).mean() < 0.1
    assert np.array_equal(decode(data, whole, (64, 96), flip=True), ours[:, ::-1])
    crop = decode(data, lambda w, h: (0.25, 0, 149.75, 110), (64, 96))  # by Pillow
    assert np.array_equal(crop, from_file.convert("RGB").resize((96, 64), Resampling.BICUBIC, (0.25, 0, 149.75, 110)))


@pytest.mark.parametrize("side", [224, 448])
def test_photographs_match_pillow_closely(side: int) -> None:
    photographs = sorted(Path(pytest.importorskip("sklearn").__file__).parent.glob("datasets/images/*.jpg"))
    assert len(photographs) == 2
    rng = np.random.default_rng(0)
    errors = []
    for path in photographs:
        data = path.read_bytes()
        for _ in range(6):
            box = random_resized_crop(rng, *Image.open(path).size)
            ours = decode(data, lambda w, h, box=box: box, (side, side))
            errors.append(abs(ours - reference(Image.open(path), box, (side, side))))
    assert np.max(errors) <= 16
    assert np.mean(errors) < 0.1


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_inner_crop_ignores_pixels_outside_it(format: str) -> None:
    """As in torchvision, for crops down to a single pixel."""
    data = encode(smooth_image(1, 150, 110), format, quality=95)
    for box in ((31, 17, 131, 97), (149, 0, 150, 110), (7, 7, 8, 8)):
        ours = decode(data, lambda w, h, box=box: box, (64, 80)).astype(int)
        assert abs(ours - reference(Image.open(io.BytesIO(data)), box, (64, 80))).max() <= 3


@pytest.mark.parametrize("reduction", [4.4, 9])
def test_reduced_decoding_gives_the_same_pixels(reduction: float) -> None:
    """Large crops are decoded at a fraction of their size, with the same pixels at the same positions."""
    image = smooth_image(2, 1003, 701)
    size = (round(500 / reduction), round(600 / reduction))
    box = (301, 103, 301 + 600, 103 + 500)
    data = encode(image, "JPEG", quality=95)
    ours = decode(data, lambda w, h: box, size).astype(int)
    theirs = reference(image, box, size)
    assert abs(ours - theirs).max() <= 6
    error = abs(ours - theirs).mean()
    assert error < 1.5
    for shift in (-1, 1):  # reveals an offset of half a pixel
        assert abs(ours[:, 1:-1] - np.roll(theirs, shift, axis=1)[:, 1:-1]).mean() > error
        assert abs(ours[1:-1] - np.roll(theirs, shift, axis=0)[1:-1]).mean() > error


def test_reduced_decoding_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    data = jpeg(0, 800, 600)
    loaded = []
    load = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **k: loaded.append(self.size) or load(self, *a, **k))
    decode(data, whole, (100, 100))
    decode(data, whole, (151, 150))  # by torch
    decode(data, lambda w, h: (0.5, 0, w, h), (151, 150))
    decode(data, lambda w, h: (0.5, 0, w, h), (301, 300))
    assert loaded == [(200, 150), (400, 300), (800, 600)]


EXIF = Image.Exif()
EXIF[0x0112] = 6
FILES = {
    "jpeg": jpeg(3, 150, 110),
    "large jpeg": jpeg(4, 1003, 701),
    "progressive": encode(smooth_image(5, 600, 500), "JPEG", progressive=True),
    "gray jpeg": encode(smooth_image(6, 333, 444).convert("L"), "JPEG"),
    "cmyk": encode(smooth_image(7, 420, 310).convert("CMYK"), "JPEG"),
    "exif": encode(smooth_image(8, 400, 300), "JPEG", exif=EXIF),
    "mpo": encode(smooth_image(9, 640, 480), "MPO", save_all=True, append_images=[smooth_image(10, 640, 480)]),
    "png": encode(smooth_image(11, 640, 480), "PNG"),
    "palette png": encode(smooth_image(12, 300, 200).convert("P"), "PNG", transparency=bytes([0])),
    "webp": encode(smooth_image(13, 500, 400), "WEBP"),
}


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records each decoding's reduction, or 0 where torchvision or Pillow decodes all pixels for torch."""
    reductions: list[int] = []

    def counted(function: str, reduction: Callable[..., int]) -> None:
        real = getattr(decoding, function)
        monkeypatch.setattr(decoding, function, lambda *a: reductions.append(reduction(*a)) or real(*a))

    counted("_decode", lambda image, reduction: reduction)
    counted("_decode_whole", lambda data, image: 0)
    return reductions


@pytest.mark.parametrize("name", FILES)
def test_crops_that_share_a_decoding_have_the_pixels_of_separate_ones(name: str, decodings: list[int]) -> None:
    """The whole image, inner crops of several sizes, fractional crops and crops that extend beyond the image."""
    width, height = Image.open(io.BytesIO(FILES[name])).size
    boxes = [(0, 0, width, height), (9, 5, width - 20, height - 30), (40, 31, 97, 99), (-6, -6, width - 9, height - 5)]
    boxes += [(0.5, 0, width - 0.5, height), (40, 31.25, 97, 99)]
    crops = [Crop(lambda w, h, box=box: box, flip) for box in boxes for flip in (False, True)]
    for order in (crops, crops[::-1]):
        alone = [decode(FILES[name], crop.choose_box, (48, 40), crop.flip) for crop in order]
        decodings.clear()
        together = decode_crops(FILES[name], order, (48, 40))
        assert all(np.array_equal(*pair) for pair in zip(together, alone, strict=True))
        assert len(decodings) == len(set(decodings)) < len(crops)
        if "png" in name or name == "webp":
            assert sorted(decodings) == [0, 1]


def test_border_is_removed_before_cropping() -> None:
    image = smooth_image(2, 120, 90)
    data = encode(image, "JPEG", quality=95)
    crops = [Crop(whole), Crop(lambda w, h: (0.5, 0, w, h)), Crop(whole)]
    inner = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[20:-20, 20:-20]
    for pixels in decode_crops(data, crops, (50, 80), border=20):
        assert abs(pixels.astype(int) - inner).max() <= 40
    assert np.array_equal(decode_crops(data, crops, (50, 80), border=20)[2], inner)


def test_each_reduction_is_decoded_once(monkeypatch: pytest.MonkeyPatch, decodings: list[int]) -> None:
    opened = []
    monkeypatch.setattr(Image, "open", lambda *a, opener=Image.open, **k: opened.append(1) or opener(*a, **k))
    near, far = Crop(lambda w, h: (10, 10, 310, 310)), Crop(lambda w, h: (0, 0, 900, 700))
    decode_crops(jpeg(0, 1000, 800), [near, near, Crop(lambda w, h: (5, 9, 400, 300), flip=True)], (160, 160))
    assert (decodings, len(opened)) == ([0], 1)
    decode_crops(jpeg(0, 1000, 800), [near, far, near, far], (160, 160))
    assert (decodings, len(opened)) == ([0, 0, 4], 3)


def test_pillow_decodes_what_torchvision_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """If torchvision lacks libjpeg or rejects a file, the pixels, or the reason that a file is bad, are the same."""
    data, torn = FILES["jpeg"], jpeg(0, 300, 200)[:1500]
    expected = decode(data, whole, (148, 140))
    without_end = data[: data.rindex(b"\xff\xd9")] + bytes(50)
    assert np.array_equal(decode(without_end, whole, (148, 140)), expected)
    calls = []

    def refuse(*_: object) -> None:
        calls.append(1)
        raise RuntimeError("decode_jpeg: torchvision not compiled with libjpeg support")

    monkeypatch.setattr(decoding, "decode_jpeg", refuse)
    assert np.array_equal(decode(data, whole, (148, 140)), expected)
    with pytest.raises(BadImage, match="truncated"):
        decode(torn, whole, (148, 140))
    assert len(calls) == 2


def test_box_is_chosen_once_from_the_image_size() -> None:
    calls = []
    decode(jpeg(0, 90, 70), lambda w, h: calls.append((w, h)) or (0, 0, w, h), (16, 16))
    assert calls == [(90, 70)]


def test_errors_while_choosing_a_box_are_not_bad_images() -> None:
    with pytest.raises(ZeroDivisionError):
        decode(jpeg(0), lambda w, h: 1 / 0, (16, 16))


def colors(image: Image.Image, format: str, **options: object) -> np.ndarray:
    return decode(encode(image, format, **options), whole, (32, 32)).reshape(-1, 3).astype(int)


def test_grayscale() -> None:
    pixels = colors(Image.new("L", (64, 64), 77), "JPEG")
    assert abs(pixels - 77).max() <= 1


def test_cmyk_with_adobes_inversion() -> None:
    pixels = colors(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG", quality=95)
    assert abs(pixels - [255, 0, 0]).max() <= 4


def test_16_bit_grayscale_is_scaled_not_clipped() -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    ours = decode(encode(Image.fromarray(ramp), "PNG"), whole, (64, 64))
    assert abs(ours[..., 0] - ramp / 257).max() <= 0.51


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "1"])
def test_other_modes_keep_their_colors(mode: str) -> None:
    image = Image.new("RGB", (64, 64), (255, 255, 255)).convert(mode)
    assert (colors(image, "PNG") == 255).all()


def test_palette_with_transparency() -> None:
    image = Image.new("P", (64, 64), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    assert (colors(image, "PNG", transparency=bytes([0, 128])) == [200, 100, 50]).all()


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, turned = encode(smooth_image(0, 80, 40), "JPEG"), encode(smooth_image(0, 80, 40), "JPEG", exif=exif)
    assert np.array_equal(decode(plain, whole, (20, 40)), decode(turned, whole, (20, 40)))
    assert (check_image(plain).is_turned, check_image(turned).is_turned) == (False, True)
    damaged = turned.replace(b"Exif\0\0MM", b"Exif\0\0XX").replace(b"Exif\0\0II", b"Exif\0\0XX")
    assert damaged != turned
    assert not check_image(damaged).is_turned


def test_tiff_orientation_is_applied() -> None:
    """Pillow applies it, so torchvision's ImageFolder shows the same."""
    image = smooth_image(0, 80, 40)
    data = encode(image, "TIFF", exif=EXIF)
    assert not check_image(data).is_turned
    assert np.array_equal(decode(data, whole, (80, 40)), np.rot90(np.asarray(image), -1))


def tiff(values: np.ndarray, bits: int, photometric: int) -> bytes:
    """An uncompressed gray TIFF, written by hand because Pillow writes neither 12 bits nor white as 0."""
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(int)
        packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
        pixels = packed.astype(np.uint8).tobytes()
    else:
        pixels = values.astype("<u2").tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory


BAD = {
    "empty": (b"", "an empty file"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n", "`git lfs pull` gets it"),
    "text": (b"<html>404</html>" * 50, "not a JPEG"),
    "icon": (encode(smooth_image(0, 64, 64), "ICO"), "not a JPEG"),
    "heic": (bytes(3) + b"\x18ftypheic" + bytes(40), "a HEIC (file that is damaged|image: the extra `heif` reads it)"),
    "tiff of six channels": (
        tiff(np.zeros((64, 64), np.uint16), 16, 1).replace(
            struct.pack("<HHII", 277, 4, 1, 1), struct.pack("<HHII", 277, 4, 1, 6)
        ),
        "is not gray",
    ),
    "truncated jpeg": (jpeg(0, 300, 200)[:1500], "truncated"),
    "header only": (jpeg(0)[:100], "a JPEG file whose header is damaged|Truncated File Read"),
    "truncated png": (encode(smooth_image(0, 200, 200), "PNG")[:3000], "truncated|broken"),
    "truncated webp": (encode(smooth_image(0, 200, 200), "WEBP")[:300], "decode|truncated|broken|not a JPEG"),
    "truncated tiff": (encode(smooth_image(0, 200, 200), "TIFF")[:3000], "truncated|damaged"),
    "truncated bmp": (encode(smooth_image(0, 200, 200), "BMP")[:3000], "truncated"),
    "truncated gif": (encode(smooth_image(0, 200, 200), "GIF")[:3000], "truncated"),
    "truncated jp2": (encode(smooth_image(0, 200, 200), "JPEG2000")[:2000], "broken"),
    "float tiff": (encode(Image.new("F", (64, 64), 0.5), "TIFF"), "floating-point pixels, .* convert it to 8 bits"),
    "signed tiff": (encode(Image.new("I", (64, 64), -5), "TIFF"), "signed or 32-bit pixels"),
    "1x1": (encode(smooth_image(0, 1, 1), "PNG"), "1 x 1 is under 8 pixels"),
    "thin": (encode(smooth_image(0, 300, 7), "PNG"), "under 8 pixels"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", BAD)
def test_bad_files_raise_bad_image(name: str) -> None:
    data, reason = BAD[name]
    attempts = (
        lambda: decode(data, whole, (32, 32)),
        lambda: decode_crops(data, [Crop(whole), Crop(whole, flip=True)], (32, 32)),
        lambda: check_image(data),
    )
    for attempt in attempts:
        with pytest.raises(BadImage, match=reason) as caught:
            attempt()
        assert "0x" not in str(caught.value)  # no memory addresses: reasons are the same in every process


def test_oversized_images_are_rejected_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.new("L", (20_000, 10_000), 128), "JPEG", quality=10)
    monkeypatch.setattr(Image.Image, "resize", lambda *a, **k: pytest.fail("decoded"))
    with pytest.raises(BadImage, match="megapixels"):
        decode(data, whole, (32, 32))
    monkeypatch.undo()
    just_over = encode(Image.new("L", (10_001, 10_000), 128), "JPEG", quality=10)
    with pytest.raises(BadImage, match="10001 x 10000 is over 100 megapixels"):
        decode(just_over, whole, (32, 32))


def test_random_damage_gives_an_image_or_bad_image() -> None:
    rng = np.random.default_rng(0)
    files = [encode(smooth_image(0, 60, 50), format) for format in FORMATS]
    rejected = 0
    for data in files * 60:
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), 5):
            damaged[position] = rng.integers(0, 256)
        try:
            assert decode(bytes(damaged), whole, (16, 16)).shape == (16, 16, 3)
        except BadImage:
            rejected += 1
    assert rejected > 20


def test_check_image_reports_the_format() -> None:
    for format in FORMATS:
        assert check_image(encode(smooth_image(0, 64, 64), format)) == (format, None, False, False, False, False, False)
    assert check_image(FILES["mpo"]).format == "JPEG"


def test_animations_and_multipage_files_show_their_first_image() -> None:
    first, second = Image.new("RGB", (64, 64), (10, 200, 30)), Image.new("RGB", (64, 64), (250, 0, 0))
    for format in ("GIF", "TIFF", "WEBP", "PNG"):
        data = encode(first, format, save_all=True, append_images=[second])
        assert check_image(data).has_more_pictures
        assert abs(decode(data, whole, (32, 32)).astype(int) - [10, 200, 30]).max() <= 5, format
    assert not check_image(FILES["mpo"]).has_more_pictures  # a photograph with a preview


def test_tiff_that_declares_12_bits_or_white_as_zero() -> None:
    ramp = np.tile(np.linspace(0, 4095, 64).astype(np.uint16), (64, 1))
    twelve = tiff(ramp, 12, 1)
    assert abs(decode(twelve, whole, (64, 64))[..., 0] - ramp / 4095 * 255).max() <= 0.51
    assert check_image(twelve).used_bits is None
    negative = tiff(ramp * 16, 16, 0)
    assert abs(decode(negative, whole, (64, 64))[..., 0] - (255 - ramp * 16 / 257)).max() <= 0.51


@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG2000"])
def test_used_bits_of_16_bit_gray_images(format: str) -> None:
    for largest, bits in ((4095, 12), (65535, 16), (255, 8)):
        ramp = np.tile(np.linspace(0, largest, 64).astype(np.uint16), (64, 1))
        data = encode(Image.fromarray(ramp), format)
        assert check_image(data) == (format, bits, True, False, False, False, False)
        rewritten = rewrite_16_bits(data, bits)
        assert check_image(rewritten) == ("PNG", None, False, False, False, False, False)
        assert abs(decode(rewritten, whole, (64, 64))[..., 0] - ramp / largest * 255).max() <= 0.51
    with pytest.raises(BadImage, match="values up to 255 exceed 127, the largest 7-bit number"):
        rewrite_16_bits(data, 7)


COLORS_16 = {
    "gray with alpha": (png_16, 2),
    "png": (png_16, 3),
    "png with alpha": (png_16, 4),
    "tiff": (tiff_16, 3),
    "tiff with alpha": (lambda values: tiff_16(values, ">"), 4),
}


@pytest.mark.parametrize("name", COLORS_16)
def test_16_bit_colors_are_rounded_and_rewritten_to_the_full_range(name: str) -> None:
    """Pillow alone would truncate to the upper 8 bits."""
    write, channels = COLORS_16[name]
    for largest, bits in ((65535, 16), (4095, 12)):
        values = ramp_16(channels, largest)
        values[..., -1] = values[..., -1] if channels == 3 else 65535
        shown = np.repeat(values[..., :1], 3, axis=2) if channels == 2 else values[..., :3]
        data = write(values)
        assert check_image(data) == ("TIFF" if "tiff" in name else "PNG", bits, False, False, False, False, False)
        assert abs(decode(data, whole, (48, 64)) - shown / 257).max() <= 0.51
        rewritten = rewrite_16_bits(data, bits)
        assert check_image(rewritten).used_bits is None
        assert abs(decode(rewritten, whole, (48, 64)) - shown / largest * 255).max() <= 0.51
    with pytest.raises(BadImage, match=r"values up to 409. exceed 255, the largest 8-bit number"):
        rewrite_16_bits(data, 8)


def test_transparent_pixels_are_detected() -> None:
    image = smooth_image(0, 64, 64)
    for format, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        clear = image.copy()
        clear.putalpha(0)
        clear, opaque = encode(clear, format, **options), encode(image.convert("RGBA"), format, **options)
        assert (check_image(clear).is_transparent, check_image(opaque).is_transparent) == (True, False)
        assert np.array_equal(decode(clear, whole, (64, 64)), np.asarray(image))
    color = image.getpixel((3, 3))
    assert check_image(encode(image, "PNG", transparency=color)).is_transparent
    assert not check_image(encode(Image.new("RGB", (64, 64)), "PNG", transparency=(1, 2, 3))).is_transparent


def test_megabytes_of_text_or_color_profile_do_not_matter() -> None:
    note = PngInfo()
    note.add_text("history", "edited " * 1_000_000, zip=True)
    image = smooth_image(0, 64, 64)
    for data in (encode(image, "PNG", pnginfo=note), encode(image, "PNG", icc_profile=bytes(5_000_000))):
        assert np.array_equal(decode(data, whole, (64, 64)), np.asarray(image))
