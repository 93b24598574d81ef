import errno
import os
import pickle
import tarfile
import zlib
from pathlib import Path

import pytest
from helpers.shard_tools import flip

import data.reader
from data import verify
from data.image_file import MAX_BYTES, BadImage
from data.image_folder import FolderReader, list_folder
from data.index import Index, build_index, load_index
from data.pack import pack
from data.reader import ShardReader
from data.sources import list_source


def test_rewritten_shard_of_the_same_size_raises(shards: Path, index: Index) -> None:
    """The content of the shard moved by 512 bytes: its size still matches the index, its offsets do not."""
    path = shards / index.shards[1]
    size = path.stat().st_size
    moved = path.read_bytes()[512:] + b"\0" * 512
    path.write_bytes(moved)
    assert path.stat().st_size == size
    with pytest.raises(ValueError, match=r"train-000001.tar: the index does not match this shard at byte .* --reindex"):
        ShardReader(index).read(30)


def test_flipped_bit_in_an_image_raises(shards: Path, index: Index) -> None:
    """When the image is read, if the index has checksums; one made on first use has none and cannot detect it."""
    flip(shards / index.shards[1], int(index.offset[30]) + 300)
    ShardReader(index).read(30)
    flip(shards / index.shards[1], int(index.offset[30]) + 300)
    checked = build_index(shards, checksums=True)
    assert checked.fingerprint == index.fingerprint
    assert checked.checksum.tolist() == [zlib.crc32(ShardReader(index).read(sample)) for sample in range(len(index))]
    flip(shards / index.shards[1], int(index.offset[30]) + 300)
    reader = ShardReader(pickle.loads(pickle.dumps(checked)))
    message = r"train-000001.tar: the bytes of sample '.*30' at byte .* differ from those indexed: .* --reindex"
    with pytest.raises(ValueError, match=message):
        reader.read(30)
    reader.read(31)


def test_shard_truncated_or_deleted_after_indexing_raises(shards: Path, index: Index) -> None:
    os.truncate(shards / index.shards[1], 1000)
    with pytest.raises(ValueError, match="does not match"):
        ShardReader(index).read(40)
    (shards / index.shards[2]).unlink()
    with pytest.raises(ValueError, match=r"train-000002.tar: the shard has disappeared"):
        ShardReader(index).read(50)


def test_number_of_open_shards_is_limited(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.reader, "MAX_OPEN_SHARDS", 2)
    reader = ShardReader(index)
    before = len(os.listdir("/proc/self/fd"))
    for sample in (0, 31, 50, 1, 51, 32):
        assert reader.read(sample)[:2] == b"\xff\xd8"
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert reader.read(0)[:2] == b"\xff\xd8"


def test_descriptors_are_not_pickled(index: Index) -> None:
    reader = ShardReader(index)
    data = reader.read(5)
    copy = pickle.loads(pickle.dumps(reader))
    reader.close()
    assert copy.read(5) == data


def test_transient_errors_are_retried(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.reader, "RETRY_AFTER", (0.0, 0.0))
    expected = ShardReader(index).read(3)
    pread, failures = os.pread, [errno.ESTALE, errno.EIO]

    def flaky(descriptor: int, count: int, offset: int) -> bytes:
        if failures:
            raise OSError(failures.pop(), "flaky")
        return pread(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", flaky)
    assert ShardReader(index).read(3) == expected
    failures[:] = [errno.EIO] * 3
    with pytest.raises(OSError, match=r"flaky at byte .*train-000000.tar") as caught:
        ShardReader(index).read(3)
    assert caught.value.errno == errno.EIO
    failures[:] = [errno.EPERM]  # not transient: not retried
    with pytest.raises(PermissionError):
        ShardReader(index).read(3)
    assert not failures


def test_file_over_a_gigabyte_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sparse file of zeros, in a tar and on its own; the readers, `verify` and `pack` all reject it."""
    size = MAX_BYTES + 512
    member = tarfile.TarInfo("a.jpg")
    member.size = size
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(member.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(512 + size + 1024)
    (tmp_path / "photos").mkdir()
    with open(tmp_path / "photos" / "a.jpg", "wb") as file:
        file.truncate(size)
    for reader in (ShardReader(load_index(tmp_path)), FolderReader(list_folder(tmp_path / "photos"))):
        with pytest.raises(BadImage, match=f"{size} bytes exceed {MAX_BYTES}") as caught:
            reader.read(0)
        assert caught.value.kind == "too large"
    assert verify.main([str(tmp_path), "--num-workers", "1"]) == 1
    assert "'a' at byte 512 cannot be decoded (too large)" in capsys.readouterr().err
    with pytest.raises(ValueError, match="1 too large"):
        pack(list_source(tmp_path / "photos"), tmp_path / "out")
