"""Tar members that are not plain files, data after the end of a tar, and compressed tars."""

import gzip
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from helpers.shard_tools import jpeg, write_tar

from data.image_folder import load_samples
from data.index import load_index
from data.reader import ShardReader
from data.verify import main


def write_links(path: Path, links: list[tuple[str, bytes, str]], images: int = 2) -> None:
    """Writes a tar of images followed by members of other types: (name, type, target)."""
    with tarfile.open(path, "w") as tar:
        for number in range(images):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = len(jpeg(number))
            tar.addfile(member, io.BytesIO(jpeg(number)))
        for name, kind, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)


def test_hard_links_are_followed_within_the_tar(tmp_path: Path) -> None:
    links = [("b/0.jpg", tarfile.LNKTYPE, "0.jpg"), ("c/x.jpg", tarfile.LNKTYPE, "b/0.jpg")]
    write_links(tmp_path / "a.tar", [*links, ("d/x.jpg", tarfile.LNKTYPE, "./1.jpg")])
    index = load_index(tmp_path)
    assert list(index.keys) == ["0", "1", "b/0", "c/x", "d/x"]
    assert [ShardReader(index).read(n) for n in range(5)] == [jpeg(n) for n in (0, 1, 0, 0, 1)]


@pytest.mark.parametrize(
    ("kind", "named", "advice"),
    [
        (tarfile.SYMTYPE, "2 x symbolic link", "tar -h"),
        (tarfile.LNKTYPE, "2 x hard link out of the tar", "--hard-dereference"),
        (tarfile.FIFOTYPE, "2 x FIFO", "regular files"),
        (tarfile.CHRTYPE, "2 x device", "regular files"),
        (b"M", "2 x member of type 'M'", "regular files"),
    ],
)
def test_sample_members_without_data_are_rejected_by_kind(
    tmp_path: Path, kind: bytes, named: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_links(tmp_path / "a.tar", [("x.jpg", kind, "../in/0.jpg"), ("y.cls", kind, "../in/y.cls")])
    assert main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert named in error
    assert "the first is 'x.jpg' at byte" in error
    assert advice in error


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_sparse_members_are_rejected(tmp_path: Path, format: str) -> None:
    """The tar does not hold their bytes verbatim, so other bytes would be read."""
    with open(tmp_path / "0.jpg", "wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(jpeg(0))
    (tmp_path / "s").mkdir()
    subprocess.run(["tar", "-cSf", "s/a.tar", f"--format={format}", "0.jpg"], cwd=tmp_path, check=True)
    with pytest.raises(ValueError, match=r"1 x sparse file; .*without `tar --sparse`"):
        load_index(tmp_path / "s")


def test_tar_of_links_alone_is_rejected(tmp_path: Path) -> None:
    write_links(tmp_path / "a.tar", [("photos", tarfile.SYMTYPE, "../in")], images=0)
    with pytest.raises(ValueError, match=r"empty shard, .*1 x symbolic link.*`tar -h`"):
        load_index(tmp_path)


def test_unused_members_are_counted_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Including the hidden files that macOS writes next to each image, which are not samples."""
    names = ["._0.jpg", "0.jpg", "0.txt", "x/.ipynb_checkpoints/0.jpg", "__MACOSX/._0.jpg", "raw", "./1.jpg", "./1.txt"]
    write_tar(tmp_path / "a.tar", [(name, jpeg(0)) for name in names])
    index = load_index(tmp_path)
    assert list(index.keys) == ["0", "./1"]
    counts = "3 x hidden file, 2 x .txt, 1 x name without an extension"
    assert counts in capsys.readouterr().err
    assert main([str(tmp_path), "--num-workers", "1"]) == 0
    assert f"unused members: {counts}" in capsys.readouterr().out


def test_concatenated_tars_are_read_to_the_last_one(tmp_path: Path) -> None:
    for name, numbers in (("a", (0, 1)), ("b", (2, 3)), ("c", (4,))):
        write_tar(tmp_path / name, [(f"{number}.jpg", jpeg(number)) for number in numbers])
    (tmp_path / "all.tar").write_bytes(b"".join((tmp_path / name).read_bytes() for name in "abc"))
    index = load_index(tmp_path)
    assert list(index.keys) == list("01234")
    assert [ShardReader(index).read(number) for number in range(5)] == [jpeg(number) for number in range(5)]


def test_data_after_the_end_is_rejected(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("0.jpg", jpeg(0))])
    with open(tmp_path / "a.tar", "ab") as file:
        file.write(b"\0" * 512 + b"rubbish!" * 64)
    with pytest.raises(ValueError, match=r"a\.tar: unexpected data after the end of the tar at byte \d+ "):
        load_index(tmp_path)


def test_copy_that_ends_in_zeros_is_rejected(tmp_path: Path) -> None:
    """As left by an interrupted download that preallocates the file."""
    write_tar(tmp_path / "a.tar", [("0.jpg", jpeg(0))])
    os.truncate(tmp_path / "a.tar", 3 << 20)
    with pytest.raises(ValueError, match=r"\d+ bytes of zeros.* copy the shard again") as caught:
        load_index(tmp_path)
    os.truncate(tmp_path / "a.tar", int(str(caught.value).split("truncate -s ")[1].strip("`")))
    assert len(load_index(tmp_path)) == 1


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz"])
@pytest.mark.parametrize("beside", [False, True])
def test_compressed_shards_are_rejected_by_name(tmp_path: Path, suffix: str, beside: bool) -> None:
    for number in range(3):
        (tmp_path / f"{number}{suffix}").write_bytes(b"compressed")
    if beside:
        write_tar(tmp_path / "3.tar", [("0.jpg", jpeg(0))])
    message = rf"3 of {4 if beside else 3} shards are compressed \(0{suffix}, 1{suffix}, 2{suffix}\).* -d .*0{suffix}`"
    for load in (load_index, load_samples):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    with pytest.raises(ValueError, match="1 of 1 shards are compressed"):
        load_index(tmp_path / f"1{suffix}")


def test_compressed_copy_next_to_its_tar_is_ignored(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("0.jpg", jpeg(0))])
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    assert len(load_index(tmp_path)) == 1


def test_compressed_content_in_a_file_named_tar_is_rejected(tmp_path: Path) -> None:
    write_tar(tmp_path / "x", [("0.jpg", jpeg(0))])
    (tmp_path / "a.tar").write_bytes(gzip.compress((tmp_path / "x").read_bytes()))
    with pytest.raises(ValueError, match=r"a\.tar: compressed, .*`gzip -dc SHARD > NEW\.tar`"):
        load_index(tmp_path)


def test_up_to_20_bad_shards_are_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(40):
        write_tar(tmp_path / f"{number:02d}.tar", [] if number % 2 else [(f"{number}.jpg", jpeg(number))])
    (tmp_path / "00.tar").write_bytes(b"x" * 20480)
    assert main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "21 of 40 shards cannot be used" in error
    assert "00.tar: no readable tar header" in error
    assert all(f"{number:02d}.tar: an empty shard" in error for number in range(1, 38, 2))
    assert "37.tar" in error
    assert "39.tar" not in error
    assert "... and 1 more" in error


def test_samples_without_an_image_are_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"{number}.{'jpg' if number == 2 else 'dng'}", jpeg(0)) for number in range(5)])
    with pytest.raises(ValueError, match=r"'0' at byte 0 has no image \(members: \.dng\), as do 3 others of 5"):
        load_index(tmp_path)


def test_shards_in_subfolders_and_with_upper_case_suffixes(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    write_tar(tmp_path / "part" / "0.tar", [("0.jpg", jpeg(0))])
    with pytest.raises(ValueError, match=r"in its subfolders, such as .*part/0\.tar"):
        load_index(tmp_path)
    write_tar(tmp_path / "A.TAR", [("0.jpg", jpeg(0))])
    assert load_index(tmp_path).shards == ("A.TAR",)


def test_all_missing_shards_of_a_pattern_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "1.tar", [("0.jpg", jpeg(0))])
    with pytest.raises(ValueError, match=r"(?s)2 of 3 missing:.*0\.tar: no such shard.*2\.tar: no such shard"):
        load_index(f"{tmp_path}/{{0..2}}.tar")


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    """In the names of a shard and its members: the index is the same in every locale."""
    write_tar(tmp_path / "stra\udcdf.tar", [("stra\udcdf.jpg", jpeg(0))])
    here = list(load_index(tmp_path).keys)
    assert here == ["stra\udcdf"]
    (tmp_path / "index.npz").unlink()
    program = "import sys; from data.index import load_index; print(ascii([*load_index(sys.argv[1]).keys]))"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    assert subprocess.check_output(command, env=environment, text=True).strip() == ascii(here)


def test_verify_prints_names_that_are_not_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "stra\udcdf.tar", [("stra\udcdf.jpg", b"no image"), ("b.cls", b"1"), ("b.jpg", jpeg(0))])
    streams = {name: io.TextIOWrapper(io.BytesIO(), "ascii") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    assert main([str(tmp_path), "--num-workers", "1", "--decode"]) == 1
    for stream in streams.values():
        stream.flush()
    assert b"2 samples in 1 shards" in streams["stdout"].buffer.getvalue()  # type: ignore[attr-defined]
    assert b"'stra\\xdf' at byte 512 cannot be decoded (no image)" in streams["stderr"].buffer.getvalue()  # type: ignore[attr-defined]
