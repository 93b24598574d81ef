"""Messages of `data.pack`: classes, images that would lose values, unsuitable folders and full disks."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.odd_images import png_16, ramp_16
from helpers.shard_tools import encode, jpeg, smooth_image, write_tar
from PIL import Image

from data import shard_writer
from data.decode import decode
from data.eval_loader import EvalLoader
from data.image_folder import load_samples
from data.index import load_index
from data.pack import main
from data.reader import ShardReader

ROOT = Path(__file__).parents[2]
READ_IN_PLACE = """
import sys
from data.image_folder import load_samples, reader_of
samples = load_samples(sys.argv[1])
reader = reader_of(samples)
print(sum(len(reader.read(sample)) for sample in range(len(samples))))
"""


def write(path: Path, data: bytes = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data or jpeg(0))


def pack(*arguments: object) -> int:
    return main([*map(str, arguments), "--num-workers", "1"])


def test_classes_are_printed_with_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("ant", "bee", "cow")):
        for image in range(number + 1):
            write(tmp_path / "in" / name / f"{image}.jpg")
    assert pack(tmp_path / "in", tmp_path / "out") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["label", "images", "class"], ["0", "1", "ant"], ["1", "2", "bee"], ["2", "3", "cow"]]
    for number in range(30):
        write(tmp_path / "many" / f"class{number:02d}" / "x.jpg")
    write(tmp_path / "many" / "class07" / "y.jpg")
    assert pack(tmp_path / "many", tmp_path / "many_out") == 0
    output = capsys.readouterr().out
    assert "... 10 more; from 1 images (class00) to 2 (class07)" in output
    assert len(output.splitlines()) == 23
    assert output.splitlines()[-1].split() == ["29", "1", "class29"]


def test_folder_without_a_readable_image_is_not_a_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The next class gets its number in every shard, even after an earlier run that failed."""
    for name in ("ant", "cow"):
        for number in range(3):
            write(tmp_path / "in" / name / f"{number}.jpg")
    write(tmp_path / "in" / "bee" / "0.jpg", b"<html>")
    write(tmp_path / "in" / "cow" / "0.jpg", b"<html>")
    command = (tmp_path / "in", tmp_path / "out", "--samples-per-shard", 2)
    assert pack(*command) == 1
    capsys.readouterr()
    assert pack(*command, "--bad", "skip") == 0
    assert "note: folders without a readable image are not classes: 'bee'" in capsys.readouterr().err
    index = load_index(tmp_path / "out")
    assert index.classes == ("ant", "cow")
    assert index.label.tolist() == [0, 0, 0, 1, 1]

    (tmp_path / "classes.txt").write_text("ant\nbee\ncow\ndoe\n")
    command = (tmp_path / "in", tmp_path / "given", "--classes", tmp_path / "classes.txt", "--bad", "skip")
    assert pack(*command) == 0
    assert "note: classes without images: 'bee', 'doe'" in capsys.readouterr().err
    index = load_index(tmp_path / "given")
    assert index.classes == ("ant", "bee", "cow", "doe")
    assert index.label.tolist() == [0, 0, 0, 2, 2]


def test_names_that_are_not_utf_8_work_in_an_ascii_locale(tmp_path: Path) -> None:
    """A folder and a damaged file with Latin-1 names."""
    folder = os.fsencode(tmp_path) + b"/in/na\xefve"
    os.makedirs(folder)
    for name, data in ((b"na\xefve.jpg", jpeg(0)), (b"\xfc.jpg", b"x"), ("é.jpg".encode(), jpeg(1))):
        with open(folder + b"/" + name, "wb") as file:
            file.write(data)
    write(tmp_path / "in" / "thé" / "x.jpg")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **ascii_only}
        return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)

    result = run("-m", "data.pack", tmp_path / "in", tmp_path / "out", "--bad", "skip")
    assert result.returncode == 0, result.stderr
    assert r"not UTF-8 are written like this: 'na\xefve'" in result.stderr
    assert [line.split()[-1] for line in result.stdout.splitlines()[2:4]] == [r"na\xefve", r"th\xe9"]
    index = load_index(tmp_path / "out")
    assert index.classes == (r"na\xefve", "thé")
    assert list(index.keys) == ["na_xefve/na_xefve", "na_xefve/é", "thé/x"]
    assert (
        (tmp_path / "out" / "rejected.txt").read_text("utf-8").startswith("na\\xefve/\\xfc.jpg\tno image\tnot a JPEG")
    )
    folder_samples = load_samples(tmp_path / "in")
    assert folder_samples.classes == index.classes
    batch = next(EvalLoader(folder_samples, size=(8, 8), batch=4).batches())
    assert batch.readable.tolist() == [True, True, False, True]
    result = run("-c", READ_IN_PLACE, tmp_path / "in")
    assert result.stdout == f"{sum(path.stat().st_size for path in (tmp_path / 'in').glob('*/*'))}\n", result.stderr


def test_class_lists_from_other_tools_are_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("x.jpg", jpeg(0)), ("x.cls", b"1")])
    (tmp_path / "classes.txt").write_bytes("\ufeffthé\r\n".encode() + b"na\xefve\r\n")
    for index in (load_index(tmp_path), load_index(tmp_path)):  # first scanned, then read from the index file
        assert index.classes == ("thé", r"na\xefve")


def gray(largest: int) -> bytes:
    return encode(Image.fromarray(np.linspace(0, largest, 64 * 64).astype(np.uint16).reshape(64, 64)), "PNG")


def test_16_bit_images_that_use_fewer_bits_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, largest in (("a", 4095), ("b", 1000), ("c", 65535)):
        write(tmp_path / "in" / f"{name}.png", gray(largest))
    write(tmp_path / "in" / "d.jpg")
    assert pack(tmp_path / "in", tmp_path / "out") == 0
    error = capsys.readouterr().err
    assert "note: 2 of 3 16-bit gray images have no value over 4095 of 65535 (12 bits)" in error
    assert "--bits 12" in error
    assert pack(tmp_path / "in", tmp_path / "out12", "--bits", 12) == 1
    assert "c.png: values up to 65535 exceed 4095, the largest 12-bit number" in capsys.readouterr().err

    (tmp_path / "in" / "c.png").unlink()
    assert pack(tmp_path / "in", tmp_path / "scaled", "--bits", 12) == 0
    assert "16 bits" not in capsys.readouterr().err
    index = load_index(tmp_path / "scaled")
    reader = ShardReader(index)
    brightest = [int(decode(reader.read(sample), lambda w, h: (0, 0, w, h), (64, 64)).max()) for sample in (0, 1)]
    assert brightest == [255, round(1000 / 4095 * 255)]
    assert reader.read(2) == jpeg(0)  # all other files are packed unchanged
    assert pack(tmp_path / "in", tmp_path / "x", "--bits", 17) == 1
    assert "--bits 17 must be from 1 to 16" in capsys.readouterr().err


def test_16_bit_colors_and_transparent_pixels_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in" / "a.png", png_16(ramp_16(3, 4095)))
    write(tmp_path / "in" / "b.png", encode(Image.new("RGBA", (64, 64), (9, 9, 9, 254)), "PNG"))
    write(tmp_path / "in" / "c.jpg")
    assert pack(tmp_path / "in", tmp_path / "out") == 0
    error = capsys.readouterr().err
    assert "note: 1 of 1 16-bit color images have no value over 4095" in error
    assert "--bits 12" in error
    assert (
        "note: images with transparent pixels are used with the colors stored under the transparency: 1 of 3" in error
    )
    assert pack(tmp_path / "in", tmp_path / "scaled", "--bits", 12) == 0
    assert "16 bits" not in capsys.readouterr().err
    pixels = decode(ShardReader(load_index(tmp_path / "scaled")).read(0), lambda w, h: (0, 0, w, h), (48, 64))
    assert abs(pixels - ramp_16(3, 4095) / 4095 * 255).max() <= 0.51


def test_16_bit_values_in_a_narrow_range_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Like CT values stored with an offset of 32768: in 8 bits only one or two shades would remain."""
    values = np.linspace(32768, 33100, 64 * 64).astype(np.uint16).reshape(64, 64)
    write(tmp_path / "in" / "ct.png", encode(Image.fromarray(values), "PNG"))
    write(tmp_path / "in" / "full.png", gray(65535))
    assert pack(tmp_path / "in", tmp_path / "out") == 0
    assert "note: 1 16-bit gray images have all their values within a sixteenth" in capsys.readouterr().err


def test_16_bit_image_of_full_range_is_not_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in" / "c.png", gray(65535))
    assert pack(tmp_path / "in", tmp_path / "out") == 0
    assert capsys.readouterr().err == ""


FORMATS = {"tif": "TIFF", "BMP": "BMP", "gif": "GIF", "jp2": "JPEG2000", "webp": "WEBP", "jfif": "JPEG"}


def test_every_format_is_packed_and_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In place, packed, and from other tools' shards, with upper-case suffixes."""
    files = {f"{i}.{suffix}": encode(smooth_image(i, 60, 50), kind) for i, (suffix, kind) in enumerate(FORMATS.items())}
    for name, data in files.items():
        write(tmp_path / "in" / name, data)
    assert pack(tmp_path / "in", tmp_path / "out") == 0
    (tmp_path / "others").mkdir()
    write_tar(tmp_path / "others" / "a.tar", [(name.upper(), data) for name, data in files.items()])
    images = []
    for folder in ("in", "out", "others"):
        batch = next(EvalLoader(load_samples(tmp_path / folder), size=(32, 32), batch=len(files)).batches())
        assert batch.readable.all()
        images.append(batch.images)
    assert (images[0] == images[1]).all()
    assert (images[0] == images[2]).all()
    assert "picture" not in capsys.readouterr().err

    animation = encode(smooth_image(0, 60, 50), "GIF", save_all=True, append_images=[smooth_image(1, 60, 50)])
    write(tmp_path / "animated" / "0.gif", animation)
    assert pack(tmp_path / "animated", tmp_path / "animated_out") == 0
    error = capsys.readouterr().err
    assert "note: only the first image of files with several (animations, pages) is used: 1 of 1\n" in error
    assert "EXIF" not in error


def test_rotated_photographs_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rotation = Image.Exif()
    rotation[0x0112] = 6
    write(tmp_path / "in" / "a.jpg", encode(smooth_image(0, 60, 50), "JPEG", exif=rotation))
    write(tmp_path / "in" / "b.jpg")
    assert pack(tmp_path / "in", tmp_path / "out") == 0
    assert (
        "note: images rotated or mirrored by an EXIF orientation are used as they are stored: 1 of 2;"
        in capsys.readouterr().err
    )


def test_unsuitable_output_folders_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in" / "a.jpg")
    for out in (tmp_path / "in", tmp_path / "in" / "shards", tmp_path / "x" / ".." / "in" / "shards"):
        assert pack(tmp_path / "in", out) == 1
        assert "give an OUT outside it" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["a.jpg"]
    write(tmp_path / "file", b"x")
    assert pack(tmp_path / "in", tmp_path / "file") == 1
    assert "file is a file: give a folder" in capsys.readouterr().err


def test_table_of_numbered_labels_without_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table has only the labels that occur, however large the largest is."""
    for name in "abcd":
        write(tmp_path / f"{name}.jpg")
    (tmp_path / "list.txt").write_text("a.jpg\t2000000000\nb.jpg\t7\nc.jpg\t7\nd.jpg\n")
    assert pack(tmp_path / "list.txt", tmp_path / "out") == 0
    summary, _, *rows = capsys.readouterr().out.splitlines()
    assert summary.startswith("4 samples with labels from 7 to 2000000000 (1 without a label) in 1 shards")
    assert [row.split() for row in rows] == [["7", "2"], ["2000000000", "1"]]


def test_full_disk_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in" / "a.jpg")
    command = (tmp_path / "in", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(shard_writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
        assert pack(*command) == 1
    assert "the shards need 0.000 GB, but only 0.000 GB are free: make room" in capsys.readouterr().err

    def full(file: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer.os, "fsync", full)
        assert pack(*command) == 1
    assert "disk or quota is full (Disk quota exceeded): make room and run the same" in capsys.readouterr().err
    assert pack(*command) == 0
