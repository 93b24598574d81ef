import errno
import fcntl
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types
from pathlib import Path

import numpy as np
import pytest
from helpers.shard_tools import encode, jpeg, smooth_image
from PIL import Image

from data import pack as pack_module
from data.index import index_paths, load_index
from data.pack import main
from data.reader import ShardReader
from data.verify import main as verify


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Three classes of seven images, one a PNG with the wrong extension, and a file that is not an image."""
    root = tmp_path / "images"
    for name in ("tench", "cat", "dog house"):
        (root / name).mkdir(parents=True)
        for number in range(7):
            (root / name / f"img.{number} x.JPEG").write_bytes(jpeg(number + len(name)))
    (root / "cat" / "img.3 x.JPEG").write_bytes(encode(smooth_image(0, 40, 40), "PNG"))
    (root / "cat" / "notes.txt").write_text("not an image")
    return root


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_class_folders(classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shards"
    assert main([str(classes), str(out), "--samples-per-shard", "8", "--num-workers", "2"]) == 0
    output = capsys.readouterr()
    assert "21 samples of 3 classes in 3 shards" in output.out
    assert "1 .txt" in output.err
    index = load_index(out)
    assert index.classes == ("cat", "dog house", "tench")
    assert index.label.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    assert index.shard_sizes.tolist() == [8, 8, 5]
    assert index.keys[7] == "dog_house/img_0_x"
    files = sorted(classes.glob("*/*.JPEG"))
    reader = ShardReader(index)
    assert [reader.read(number) for number in range(21)] == [path.read_bytes() for path in files]
    with tarfile.open(out / "train-000000.tar") as tar:
        names = tar.getnames()
        assert {(member.mtime, member.uid, member.uname) for member in tar.getmembers()} == {(0, 0, "")}
    assert names[:2] == ["cat/img_0_x.jpg", "cat/img_0_x.cls"]
    assert "cat/img_3_x.png" in names
    assert sorted(path.name for path in out.iterdir() if path.suffix != ".tar") == [
        "classes.txt",
        "index.npz",
        "pack.json",
    ]


def test_flat_folder_and_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "flat"
    (folder / "sub").mkdir(parents=True)
    for name in ("b.jpg", "a.jpg", "sub/c.jpg"):
        (folder / name).write_bytes(jpeg(0))
    command = [str(folder), str(tmp_path / "from_folder"), "--num-workers", "1"]
    assert main(command) == 1
    assert "images (2) are next to folders of images" in capsys.readouterr().err
    assert main([*command, "--no-labels"]) == 0
    assert "3 samples without labels in 1 shards" in capsys.readouterr().out
    index = load_index(tmp_path / "from_folder")
    assert (list(index.keys), index.label.tolist(), index.classes) == (["a", "b", "sub/c"], [-1] * 3, ())

    (folder / "list.txt").write_text("sub/c.jpg\t5\nb.jpg\t2\n\n")
    assert main([str(folder / "list.txt"), str(tmp_path / "from_list"), "--num-workers", "1", "--prefix", "val"]) == 0
    index = load_index(tmp_path / "from_list")
    assert (list(index.keys), index.label.tolist()) == (["b", "sub/c"], [2, 5])
    assert index.shards == ("val-000000.tar",)


def test_nothing_to_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.txt").write_text("")
    assert main([str(tmp_path / "in"), str(tmp_path / "out")]) == 1
    assert "no images" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_unreadable_images_are_rejected_or_skipped(
    classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shards"
    (classes / "cat" / "img.1 x.JPEG").write_bytes(jpeg(0, 300, 200)[:2000])
    (classes / "tench" / "img.5 x.JPEG").write_bytes(b"<html>")
    command = [str(classes), str(out), "--samples-per-shard", "8", "--num-workers", "1"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "2 of 21 files are not readable images (1 damaged, 1 no image)" in error
    assert "cat/img.1 x.JPEG: " in error
    assert "tench/img.5 x.JPEG: not a JPEG" in error
    assert "Traceback" not in error
    assert not list(out.glob("*.tar"))

    assert main([*command, "--bad", "skip"]) == 0
    index = load_index(out)
    assert len(index) == 19
    assert "cat/img_1_x" not in list(index.keys)
    assert [line.split("\t")[:2] for line in (out / "rejected.txt").read_text().splitlines()] == [
        ["cat/img.1 x.JPEG", "damaged"],
        ["tench/img.5 x.JPEG", "no image"],
    ]


def test_only_unreadable_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    assert main([str(tmp_path), str(tmp_path / "out"), "--bad", "skip", "--num-workers", "1"]) == 1
    assert not list((tmp_path / "out").glob("*.tar"))


def test_packing_again(classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shards"
    command = [str(classes), str(out), "--num-workers", "1"]
    assert main(command) == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main(command) == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert main([*command, "--samples-per-shard", "5"]) == 1
    assert "holds shards of other files or settings" in capsys.readouterr().err
    (classes / "cat" / "img.0 x.JPEG").write_bytes(jpeg(99))
    assert main(command) == 1
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x.tar").write_bytes(b"")
    assert main([str(classes), str(tmp_path / "foreign")]) == 1
    assert "already holds other shards" in capsys.readouterr().err


def test_packing_resumes_after_a_kill(tmp_path: Path) -> None:
    """kill -9 while writing shards publishes nothing and leaves no process; a rerun gives identical shards."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(60):
        (images / f"{number:03d}.png").write_bytes(encode(smooth_image(number, 500, 500), "PNG", compress_level=1))
    out, staging = tmp_path / "out", tmp_path / "out" / ".pack"
    command = [str(images), str(out), "--samples-per-shard", "1", "--num-workers", "2"]
    process = subprocess.Popen([sys.executable, "-m", "data.pack", *command])
    while len(list(staging.glob("*.tar"))) < 3:
        assert process.poll() is None
        time.sleep(0.002)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert children
    while any(os.path.exists(f"/proc/{child}") for child in children):
        time.sleep(0.05)
    finished = {path.name: path.stat().st_mtime_ns for path in staging.glob("*.tar")}
    assert 3 <= len(finished) < 60
    assert not list(out.glob("*.tar"))
    (staging / "train-000059.tar.1.tmp").write_bytes(b"left over")

    assert main(command) == 0
    assert not staging.exists()
    kept = {name: (out / name).stat().st_mtime_ns for name in finished}
    assert kept == finished
    assert main([*command[:1], str(tmp_path / "other"), *command[2:4], "--num-workers", "1"]) == 0
    assert shard_bytes(out) == shard_bytes(tmp_path / "other")
    assert len(load_index(out)) == 60


def test_packing_resumes_after_an_interrupt_while_publishing(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = [str(classes), str(out), "--samples-per-shard", "8", "--num-workers", "1"]
    replace, published = os.replace, []

    def interrupted(source: Path, target: Path) -> None:
        if Path(target).parent == out:
            published.append(target)
            if len(published) == 2:
                raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(pack_module.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(command)
    assert len(list(out.glob("*.tar"))) == 1
    assert len(load_index(out)) == 8  # indexed before packing finished
    assert main(command) == 0
    assert len(load_index(out)) == 21


def test_second_packer_in_the_same_folder_is_rejected(
    classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pack_module._plan(out, {}):
        assert main([str(classes), str(out)]) == 1
    assert "another process is packing" in capsys.readouterr().err


def test_file_system_without_locks_only_gets_a_note(
    classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")  # Lustre without -o flock

    monkeypatch.setattr(fcntl, "flock", fail)
    assert main([str(classes), str(tmp_path / "out"), "--num-workers", "1"]) == 0
    note = "its file system has no locks ([Errno 38] Function not implemented): make sure that nothing else packs into"
    assert note in capsys.readouterr().err


def test_short_side_shrinks_large_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images with a longer short side are shrunk, others keep their bytes; the index and `verify` report it."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    rotated = Image.Exif()
    rotated[0x0112] = 6  # to be shown rotated by 90 degrees clockwise
    large, small = smooth_image(0, 300, 200), jpeg(1, 96, 300)
    profile = {"icc_profile": bytes(3000), "comment": b"made by a camera"}
    (photos / "a.jpg").write_bytes(encode(large, "JPEG", quality=95, exif=rotated, **profile))
    (photos / "b.png").write_bytes(encode(large, "PNG"))
    (photos / "c.jpg").write_bytes(small)
    (photos / "d.tif").write_bytes(encode(large, "TIFF", exif=rotated))
    (photos / "e.png").write_bytes(encode(Image.new("RGBA", (97, 300), (90, 60, 30, 0)), "PNG"))
    command = [str(photos), str(out), "--num-workers", "1"]
    shrunk = [*command, "--short-side", "96"]
    for wrong, message in (
        (
            [*command, "--quality", "90"],
            "--quality 90 only applies to photographs that --short-side shrinks: give both",
        ),
        ([*command, "--short-side", "7"], "--short-side 7 must be at least 8"),
        ([*shrunk, "--quality", "0"], "--quality 0 must be from 1 to 100"),
    ):
        assert main(wrong) == 1
        assert message in capsys.readouterr().err
    assert main([*shrunk, "--quality", "95"]) == 0
    assert "4 of 5 images were shrunk, the others packed unchanged" in (stderr := capsys.readouterr().err)
    assert "EXIF orientation" not in stderr
    index = load_index(out)
    reader = ShardReader(index)
    files = {key: reader.read(sample) for sample, key in enumerate(index.keys)}
    images = {key: Image.open(io.BytesIO(data)) for key, data in files.items()}
    assert files["c"] == small
    assert {key: image.size for key, image in images.items()} == {
        "a": (96, 144),
        "b": (144, 96),
        "c": (96, 300),
        "d": (96, 144),
        "e": (96, 297),
    }
    assert {image.format for image in images.values()} == {"JPEG"}
    assert not images["a"].info.keys() & {"exif", "icc_profile", "comment"}
    upright = large.resize((144, 96), Image.Resampling.LANCZOS)
    for key, shown in (("a", upright.transpose(Image.Transpose.ROTATE_270)), ("b", upright)):
        assert abs(np.asarray(images[key]).astype(int) - np.asarray(shown)).mean() < 2
        assert abs(np.asarray(images["a"]).astype(int) - np.asarray(images["d"])).mean() < 2
    assert index.shrunk == "photographs whose short side was over 96 pixels were shrunk to it, JPEG 95"
    index_paths(out)[0].unlink()
    assert load_index(out).shrunk == index.shrunk
    assert verify([str(out)]) == 0
    assert index.shrunk in capsys.readouterr().out
    assert main([*shrunk, "--quality", "90"]) == 1
    assert "holds shards of other files or settings" in capsys.readouterr().err
    assert main([str(photos), str(tmp_path / "unchanged"), "--num-workers", "1"]) == 0
    assert load_index(tmp_path / "unchanged").shrunk == ""


def test_free_space_check_uses_the_size_after_shrinking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(jpeg(0, 300, 200))
    command = [str(tmp_path / "photos"), str(tmp_path / "out"), "--num-workers", "1"]
    assert main(command) == 1
    assert main([command[0], str(tmp_path / "shrunk"), *command[2:], "--short-side", "32"]) == 0


@pytest.mark.parametrize("shrink", [[], ["--short-side", "96"]])
def test_photograph_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shrink: list[str]) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(jpeg(0, 300, 200))
    decoders, get = [], Image._getdecoder
    monkeypatch.setattr(Image, "_getdecoder", lambda *args: decoders.append(args[1]) or get(*args))
    assert main([str(tmp_path / "photos"), str(tmp_path / "out"), "--num-workers", "1", *shrink]) == 0
    assert decoders == ["jpeg"]
