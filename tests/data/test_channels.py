"""Images with other channels or more bits than photographs: every value is read as stored, or the file is rejected."""

import io
import json
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from helpers.shard_tools import jpeg, write_tar
from PIL import Image

from data import pack, statistics, verify
from data.channels import read_pixels
from data.decode import Crop, decode, decode_crops
from data.eval_loader import EvalLoader
from data.image_file import BadImage
from data.index import load_index
from data.loader import Loader
from data.pixel_format import IMAGENET, RGB, PixelFormat, computable
from data.transforms import Augmentation

SIZE = (24, 36)


def noise(channels: int, dtype: str, seed: int = 0) -> np.ndarray:
    """Random values, (H, W, C); integers cover the whole range of the type."""
    rng = np.random.default_rng(seed)
    shape = (*SIZE, channels)
    if dtype == "float32":
        return rng.normal(1000, 400, shape).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max + 1, shape, dtype)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def saved(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(array: np.ndarray) -> bytes:
    return saved(Image.fromarray(array.squeeze()))


def tiff(array: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def bands(array: np.ndarray) -> bytes:
    return tiff(array.squeeze(), photometric="minisblack", planarconfig="contig" if array.shape[2] > 1 else None)


def planes(array: np.ndarray) -> bytes:
    return tiff(np.moveaxis(array, -1, 0), photometric="minisblack", planarconfig="separate")


def deflated(array: np.ndarray) -> bytes:
    return tiff(array, photometric="minisblack", planarconfig="contig", compression="zlib")


def pages(array: np.ndarray) -> bytes:
    first, *others = (Image.fromarray(array[..., c]) for c in range(array.shape[2]))
    return saved(first, "TIFF", save_all=True, append_images=others)


def big_endian(array: np.ndarray) -> bytes:
    return npy(array.astype(array.dtype.newbyteorder(">")))


def columns_first(array: np.ndarray) -> bytes:
    return npy(np.asfortranarray(array))


FILES: dict[Callable[[np.ndarray], bytes], list[tuple[int, str]]] = {
    png: [(1, "uint8"), (2, "uint8"), (4, "uint8"), (1, "uint16")],
    bands: [(c, d) for c in (1, 2, 4, 5, 13) for d in ("uint8", "uint16", "float32")] + [(3, "uint16")],
    planes: [(c, d) for c in (2, 3, 5) for d in ("uint16", "float32")],
    deflated: [(5, "uint16"), (4, "uint8")],
    pages: [(2, "uint8"), (5, "uint16")],
    npy: [(c, d) for c in (1, 2, 3, 5, 16) for d in ("uint8", "uint16", "float32")],
    big_endian: [(5, "uint16"), (2, "float32")],
    columns_first: [(5, "uint16")],
}
CASES = [(write, channels, dtype) for write, formats in FILES.items() for channels, dtype in formats]


@pytest.mark.parametrize(("write", "channels", "dtype"), CASES, ids=lambda case: getattr(case, "__name__", str(case)))
def test_every_value_of_a_file_is_preserved(write: Callable[[np.ndarray], bytes], channels: int, dtype: str) -> None:
    array = noise(channels, dtype)
    data, format = write(array), PixelFormat(channels, dtype)  # type: ignore[arg-type]
    found = read_pixels(data, format)
    assert found.dtype == dtype
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, array)
    whole = decode(data, lambda width, height: (0, 0, width, height), SIZE, flip=True, format=format)
    np.testing.assert_array_equal(whole, array[:, ::-1])


@pytest.mark.parametrize("mode", ["LA", "RGB", "RGBA"])
def test_16_bit_png_with_colors_or_alpha_is_preserved(mode: str) -> None:
    channels = len(mode)
    array = noise(channels, "uint16")
    data = _png_16_bit(array, {"LA": 4, "RGB": 2, "RGBA": 6}[mode])
    np.testing.assert_array_equal(read_pixels(data, PixelFormat(channels, "uint16")), array)
    if mode != "LA":  # transparency is dropped, as for photographs
        np.testing.assert_array_equal(read_pixels(data, PixelFormat(3, "uint16")), array[..., :3])


def _png_16_bit(array: np.ndarray, color_type: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, color_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bit_gray_is_repeated_for_three_channels() -> None:
    array = noise(1, "uint16")
    np.testing.assert_array_equal(read_pixels(png(array), PixelFormat(3, "uint16")), array.repeat(3, axis=2))


REJECTED = {
    "colors for gray": (jpeg(1), PixelFormat(1), "channels: 3, not data.channels=1", "other channels"),
    "gray for colors and alpha": (png(noise(1, "uint8")), PixelFormat(4), "channels: 1, not data.channels=4", ""),
    "16 bits for 8": (png(noise(1, "uint16")), PixelFormat(1), "uint16, not data.dtype=uint8", "other type"),
    "8 bits for 16": (jpeg(1), PixelFormat(3, "uint16"), "uint8, not data.dtype=uint16", "other type"),
    "wide planes for 8 bits": (planes(noise(5, "uint16")), PixelFormat(5), "uint16, not data.dtype=uint8", ""),
    "CMYK": (saved(Image.new("CMYK", (16, 16)), "JPEG"), PixelFormat(4), "channels: 3", ""),
    "a palette": (saved(Image.new("P", (16, 16))), PixelFormat(1), "channels: 3", ""),
    "an object": (
        b"\x93NUMPY\x01\0v\0" + b"{'descr': '|O', 'fortran_order': False, 'shape': (16, 16), }".ljust(117) + b"\n",
        PixelFormat(1),
        "a .npy file of dtype |O: save it as uint8, uint16 or float32",
        "unsupported",
    ),
    "a pickle": (b"\x93NUMPY" + pickle.dumps(print), PixelFormat(1), "header is damaged", "damaged"),
    "signed": (npy(noise(1, "uint8").astype("int16")), PixelFormat(1), "a .npy file of dtype <i2", "unsupported"),
    "fields": (npy(np.zeros((16, 16), [("a", "u1")])), PixelFormat(1), "not hold a numeric array", "unsupported"),
    "0 as white": (
        tiff(noise(1, "float32").squeeze(), photometric="miniswhite"),
        PixelFormat(1, "float32"),
        "has 0 as white",
        "unsupported",
    ),
    "turned": (
        tiff(noise(1, "float32").squeeze(), extratags=[(274, 3, 1, 6, True)]),
        PixelFormat(1, "float32"),
        "upright",
        "unsupported",
    ),
    "one dimension": (npy(np.zeros(400, "uint8")), PixelFormat(1), "not hold a numeric array", "unsupported"),
    "channels first": (
        npy(np.zeros((5, 20, 20), "uint8")),
        PixelFormat(5),
        r"as \(height, width, channels\)",
        "other channels",
    ),
    "less than it says": (npy(noise(5, "uint16"))[:-1], PixelFormat(5, "uint16"), "bytes of values, but", "damaged"),
    "more than it says": (npy(noise(5, "uint16")) + b"0", PixelFormat(5, "uint16"), "bytes of values, but", ""),
    "a lying shape": (
        npy(noise(1, "uint8").squeeze()).replace(b"(24, 36)", b"(99999, 99999)"),
        PixelFormat(1),
        "over 100 megapixels",
        "too large",
    ),
    "a long header": (b"\x93NUMPY\x02\0\xff\xff\xff\x7f" + bytes(5000), PixelFormat(1), "at most 4096", ""),
    "nothing behind the magic": (b"\x93NUMPY", PixelFormat(1), "header is damaged", "damaged"),
    "not finite": (npy(np.full((16, 16), np.nan, "float32")), PixelFormat(1, "float32"), "non-finite", "damaged"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_unsuitable_files_are_rejected_by_kind(name: str) -> None:
    data, format, reason, kind = REJECTED[name]
    with pytest.raises(BadImage, match=reason.replace("|", r"\|")) as caught:
        read_pixels(data, format)
    assert kind in caught.value.kind


def test_tiff_that_decompresses_beyond_its_size_is_rejected() -> None:
    file = io.BytesIO()
    options = {"photometric": "minisblack", "planarconfig": "contig", "compression": "zlib"}
    tifffile.imwrite(file, iter([zlib.compress(bytes(10**6))]), shape=(*SIZE, 5), dtype="uint16", **options)
    with pytest.raises(BadImage, match="decompresses to more"):
        read_pixels(file.getvalue(), PixelFormat(5, "uint16"))


def test_tiff_with_too_many_bytes_of_pixels_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bands(noise(5, "float32"))
    monkeypatch.setattr("data.channels.MAX_BYTES", 24 * 36 * 5 * 4 - 1)
    with pytest.raises(BadImage, match="exceed 17279") as caught:
        read_pixels(data, PixelFormat(5, "float32"))
    assert caught.value.kind == "too large"


@pytest.mark.parametrize(
    ("write", "channels"), [(npy, 5), (bands, 5), (deflated, 5), (planes, 2), (pages, 2), (png, 1)]
)
def test_damage_only_ever_raises_bad_image(write: Callable[[np.ndarray], bytes], channels: int) -> None:
    format, rng = PixelFormat(channels, "uint16"), np.random.default_rng(0)
    data = write(noise(channels, "uint16"))
    read_pixels(data, format)
    rejected = 0
    for _ in range(100):
        damaged = bytearray(data)
        for position in rng.integers(0, min(len(data), 400), 3).tolist():
            damaged[position] = int(rng.integers(256))
        cut = int(rng.integers(len(data))) if rng.random() < 0.3 else len(data)
        try:
            assert read_pixels(bytes(damaged[:cut]), format).shape[2] == channels
        except BadImage:
            rejected += 1
    assert rejected > 20


@pytest.mark.parametrize("box", [(3, 1, 31, 20), (3.5, 1.25, 31.0, 20.75)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_each_channel_is_resized_like_a_float_image(dtype: str, box: tuple[float, float, float, float]) -> None:
    array, format = noise(5, dtype), PixelFormat(5, dtype)  # type: ignore[arg-type]
    found = decode(npy(array), lambda *_: box, (8, 12), format=format)
    channels = [Image.fromarray(array[..., c].astype("float32")) for c in range(5)]
    if isinstance(box[0], int):
        channels = [channel.crop(box) for channel in channels]
        box = (0, 0, *channels[0].size)
    exact = np.stack([np.asarray(channel.resize((12, 8), 3, box=box)) for channel in channels], axis=2)
    assert found.dtype == dtype
    if dtype == "float32":
        np.testing.assert_array_equal(found, exact)
    else:
        difference = np.abs(found.astype(float) - exact.clip(0, np.iinfo(dtype).max))
        assert difference.max() <= (1.6 if dtype == "uint8" else 0.5)  # bytes are rounded between the passes


def test_rgb_arrays_give_the_same_pixels_as_rgb_images() -> None:
    array = noise(3, "uint8")
    crops = [Crop(lambda *_: (2.5, 1.25, 30.5, 20.75)), Crop(lambda *_: (4, 0, 28, 24), True)]
    for from_image, from_array in zip(
        *(decode_crops(data, crops, (8, 8)) for data in (png(array), npy(array))), strict=True
    ):
        assert np.abs(from_image.astype(int) - from_array).max() <= 1  # torch rounds between rows and columns


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Six 16-bit samples with five channels; one is a TIFF next to an array, which is ignored."""
    members = [(f"{i}.npy", npy(noise(5, "uint16", i) // 16)) for i in range(5)]
    members += [("5.tif", bands(noise(5, "uint16", 5) // 16)), ("5.npy", npy(np.zeros(3)))]
    write_tar(tmp_path / "a.tar", members)
    return tmp_path


def test_batches_have_the_values_of_the_files(shards: Path) -> None:
    index, format = load_index(shards), PixelFormat(5, "uint16")
    assert len(index) == 6
    (batch,) = EvalLoader(index, size=(240, 360), batch=6, format=format).batches()
    assert batch.images.dtype == torch.uint16
    assert batch.readable.all()
    whole = Augmentation("simple", flip=0.0)
    loader = Loader(index, size=SIZE, batch=6, seed=0, augmentations=(whole,), format=format, num_workers=1)
    ((drawn,),) = loader.batches(0, 1)
    assert drawn.images.dtype == torch.uint16
    assert drawn.images.shape == (6, *SIZE, 5)
    assert not drawn.skipped
    assert drawn.to(torch.device("cpu")).images.dtype == torch.float32
    for images, sample in zip(computable(drawn.images), drawn.samples.tolist(), strict=True):
        array = noise(5, "uint16", sample) // 16
        inner = images[6:-6, 6:-6].numpy()  # the crop is shifted by at most four pixels
        shifts = [array[y : y + 12, x : x + 24] for y in range(2, 11) for x in range(2, 11)]
        assert any((inner == shifted).all() for shifted in shifts)


def test_images_of_another_format_are_skipped_and_reported(shards: Path) -> None:
    index = load_index(shards)
    (batch,) = EvalLoader(index, size=SIZE, batch=6, format=PixelFormat(1)).batches()
    assert not batch.readable.any()
    assert not batch.images.any()
    problems = verify.check_shards(index, decode=True, format=PixelFormat(1)).problems
    assert len(problems) == 6
    assert all("(other channels): channels: 5, not data.channels=1" in problem for problem in problems)
    assert verify.check_shards(index, decode=True, format=PixelFormat(5, "uint16")).problems == []


def test_pack_and_verify_take_channels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, out = tmp_path / "photos", tmp_path / "shards"
    photos.mkdir()
    for i in range(3):
        (photos / f"{i}.npy").write_bytes(npy(noise(5, "uint8", i)))
    (photos / "gray.png").write_bytes(png(noise(1, "uint8")))
    command = [str(photos), str(out), "--channels", "5", "--num-workers", "1"]
    assert pack.main(command) == 1
    assert "gray.png: channels: 1, not data.channels=5" in capsys.readouterr().err
    assert pack.main([*command, "--bad", "skip"]) == 0
    assert verify.main([str(out), "--decode", "--channels", "5", "--num-workers", "1"]) == 0
    assert verify.main([str(out), "--decode", "--num-workers", "1"]) == 1
    assert "channels: 5, not data.channels=3" in capsys.readouterr().err
    assert json.loads((out / "pack.json").read_text())["channels"] == 5
    assert (out / "rejected.txt").read_text() == "gray.png\tother channels\tchannels: 1, not data.channels=5\n"
    assert pack.main([*command[:1], str(tmp_path / "b"), "--channels", "17"]) == 1
    assert "--channels 17: images have 1 to 16" in capsys.readouterr().err
    assert pack.main([*command[:1], str(tmp_path / "b"), "--channels", "5", "--bits", "12"]) == 1
    assert "--bits and --short-side are for photographs" in capsys.readouterr().err


def test_arrays_are_packed_only_if_channels_are_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(jpeg(1))
    (tmp_path / "photos" / "a.npy").write_bytes(npy(noise(3, "uint8")))
    assert pack.main([str(tmp_path / "photos"), str(tmp_path / "shards"), "--num-workers", "1"]) == 0
    output = capsys.readouterr()
    assert "1 samples" in output.out
    assert "--channels C` treats .npy files as images" in output.err


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_statistics_equal_numpys_over_all_pixels(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = [noise(4, dtype, i)[: 24 - i] for i in range(5)]
    members = [(f"{i}.npy", npy(array)) for i, array in enumerate(arrays)]
    write_tar(tmp_path / "a.tar", [*members, ("bad.jpg", b"no image"), ("other.npy", npy(noise(3, dtype)))])
    assert statistics.main([str(tmp_path), "--channels", "4", "--dtype", dtype, "--num-workers", "1"]) == 0
    *_, keys, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    pixels = np.concatenate([array.reshape(-1, 4) for array in arrays]).astype(float)
    pixels /= PixelFormat(4, dtype).white  # type: ignore[arg-type]
    np.testing.assert_allclose(found["mean"], pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["std"], pixels.std(0), rtol=1e-12)
    assert (found["images"], found["pixels"]) == (5, len(pixels))
    assert found["skipped"] == {"no image": 1, "other channels": 1}
    assert keys.startswith(f"data.channels=4 data.dtype={dtype} data.mean=[{found['mean'][0]:.6g},")


def test_statistics_with_workers_fewer_images_or_none_usable(shards: Path) -> None:
    format = PixelFormat(5, "uint16")
    assert statistics.measure(str(shards), format) == statistics.measure(str(shards), format, workers=2)
    assert statistics.measure(str(shards), format, images=2).images == 2
    with pytest.raises(ValueError, match=r"none of 6 images can be used \(6 other channels\)"):
        statistics.measure(str(shards), RGB)


def test_imagenet_format_is_rgb() -> None:
    assert IMAGENET.format == RGB
