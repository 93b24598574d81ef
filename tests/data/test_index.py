import multiprocessing
import os
import shutil
import signal
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from helpers.shard_tools import encode, jpeg, smooth_image, write_tar
from webdataset.tariterators import base_plus_ext

import data.index
import data.index_scan
from data.index import Index, index_paths, load_index
from data.reader import ShardReader
from data.scan import split_name
from data.waiting import while_waiting

FORK = multiprocessing.get_context("fork")


def test_index_matches_what_webdataset_reads(shards: Path, index: Index) -> None:
    reader = ShardReader(index)
    urls = [str(shards / name) for name in index.shards]
    samples = list(wds.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == list(index.keys)
    assert [sample["jpg"] for sample in samples] == [reader.read(number) for number in range(len(index))]
    assert [int(sample["cls"]) for sample in samples] == index.label.tolist()
    assert index.shard_sizes.tolist() == [30, 16, 7]
    assert [index.shard_of(sample) for sample in range(53)] == [0] * 30 + [1] * 16 + [2] * 7


def test_tars_in_subfolders_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.tar", "more/b.tar", "more/c.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / name, [("x.jpg", jpeg(0))])
    assert len(load_index(tmp_path)) == 1
    assert "2 tars in its subfolders are not part of these shards" in capsys.readouterr().err
    assert len(load_index(f"{tmp_path}/{{a,more/b,more/c}}.tar")) == 3
    assert "not part" not in capsys.readouterr().err


def test_home_is_expanded_and_wildcards_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_tar(tmp_path / "a.tar", [("x.jpg", jpeg(0))])
    assert len(load_index("~/a.tar")) == 1
    with pytest.raises(ValueError, match=r"\*\.tar: use a pattern with braces, as in"):
        load_index(f"{tmp_path}/*.tar")


@pytest.mark.parametrize(
    "name", ["a.jpg", "x/a.b.JPG", "x.y/a.png", "x.y/a", ".a.jpg", "x/._a.jpg", "./a.cls", "a", "a.", "x/a.json"]
)
def test_names_are_split_as_webdataset_does(name: str) -> None:
    key, suffix = base_plus_ext(name)
    assert split_name(name) == (None if key is None else (key, suffix.lower()))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_foreign_shards_are_indexed_on_first_use(tmp_path: Path, format: int) -> None:
    """Shards from other tools: long names, unused members, upper case, metadata, text labels, no index file."""
    long = "folder/" + "long" * 20 + "/" + "name" * 20
    images = [jpeg(0), encode(smooth_image(1, 30, 30), "PNG"), encode(smooth_image(2, 30, 30), "WEBP"), jpeg(3)]
    members = [
        ("__index__.json", b"{}"),
        ("README.md", b"about"),
        ("a.JPEG", images[0]),
        ("a.json", b'{"caption": 1}'),
        ("a.seg.png", images[1]),
        ("sub/b.txt", b"caption"),
        ("sub/b.PNG", images[1]),
        ("sub/b.cls", b"7\n"),
        ("c.cls", b"tabby cat"),
        ("c.webp", images[2]),
        (long + ".jpg", images[3]),
    ]
    write_tar(tmp_path / "x.tar", members, format)
    index = load_index(tmp_path)
    assert list(index.keys) == ["a", "sub/b", "c", long]
    assert index.label.tolist() == [-1, 7, -1, -1]
    assert [ShardReader(index).read(number) for number in range(4)] == images


def test_second_load_reads_the_index_file(shards: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.index_scan, "scan_shard", lambda path: pytest.fail("scanned again"))
    again = load_index(shards)
    for name in ("shard_ends", "offset", "length", "label", "shard_sizes", "shard_bytes"):
        assert np.array_equal(getattr(again, name), getattr(index, name)), name
        assert getattr(again, name).dtype == getattr(index, name).dtype, name
    assert list(again.keys) == list(index.keys)
    assert again.keys[-1] == list(index.keys)[-1]
    assert (again.fingerprint, again.shards, again.root) == (index.fingerprint, index.shards, index.root)


def test_fingerprint_depends_on_the_content_and_not_on_the_folder(shards: Path, index: Index, tmp_path: Path) -> None:
    moved = shutil.copytree(shards, tmp_path / "moved")
    assert load_index(moved).fingerprint == index.fingerprint
    (moved / "index.npz").unlink()
    (moved / "train-000001.tar").unlink()
    assert load_index(moved).fingerprint != index.fingerprint


def test_brace_pattern_and_single_tar_have_separate_indexes(shards: Path, index: Index) -> None:
    part = load_index(f"{shards}/train-{{000000..000001}}.tar")
    assert (part.shards, len(part)) == (index.shards[:2], 46)
    assert len(load_index(shards / "train-000002.tar")) == 7
    assert len(load_index(shards)) == 53
    with pytest.raises(ValueError, match=r"train-000003.tar: no such shard \(2 of 5 missing\)"):
        load_index(f"{shards}/train-{{000000..000004}}.tar")


def _load_and_count(shards: Path, log: Path, barrier: "multiprocessing.synchronize.Barrier") -> None:
    scan = data.index.scan_shards

    def counted(*arguments: Any, **options: Any) -> Index:
        with open(log, "a") as file:
            file.write("scanned\n")
        time.sleep(0.3)
        return scan(*arguments, **options)

    data.index.scan_shards = counted
    barrier.wait(30)
    assert len(load_index(shards)) == 53


def test_concurrent_processes_build_the_index_once(shards: Path, tmp_path: Path) -> None:
    barrier = FORK.Barrier(4)
    processes = [FORK.Process(target=_load_and_count, args=(shards, tmp_path / "log", barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "log").read_text() == "scanned\n"
    assert sorted(path.name for path in shards.iterdir() if path.suffix != ".tar") == ["index.npz"]


def test_builder_of_the_index_looks_for_signals_after_each_shard(shards: Path) -> None:
    class ToldToStopError(Exception):
        pass

    looks: list[None] = []

    def look() -> None:
        looks.append(None)
        if len(looks) == 2:
            raise ToldToStopError

    with pytest.raises(ToldToStopError), while_waiting(look):
        load_index(shards)
    assert not (shards / "index.npz").exists()
    assert len(load_index(shards)) == 53, "its lock does not remain"


def _hang_while_building(shards: Path, building: Path) -> None:
    def hang(*arguments: Any, **options: Any) -> Index:
        building.touch()
        time.sleep(1000)
        raise AssertionError

    data.index.scan_shards = hang
    load_index(shards)


def test_killed_builder_does_not_block_others(shards: Path, tmp_path: Path) -> None:
    process = FORK.Process(target=_hang_while_building, args=(shards, tmp_path / "building"))
    process.start()
    while not (tmp_path / "building").exists():
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert len(load_index(shards)) == 53


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that a user other than root can reach, unlike tmp_path."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def _load_as_another_user(shards: Path) -> None:
    if os.getuid() == 0:  # root can write everywhere
        os.setgid(65534)
        os.setuid(65534)
    for _ in range(2):
        assert len(load_index(shards)) == 53
    assert index_paths(shards)[1].exists()


def test_index_of_a_read_only_folder_goes_to_the_user_cache(
    shards: Path, open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_folder / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    read_only = shutil.copytree(shards, open_folder / "shards")
    read_only.chmod(0o555)
    process = FORK.Process(target=_load_as_another_user, args=(read_only,))
    process.start()
    process.join(60)
    read_only.chmod(0o755)
    assert process.exitcode == 0
    assert all(path.suffix == ".tar" for path in read_only.iterdir())


def test_no_shards(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no shards .*python -m data.pack"):
        load_index(tmp_path)
    with pytest.raises(ValueError, match="no such shard"):
        load_index(tmp_path / "nowhere")


def _cut(path: Path, size: int) -> None:
    os.truncate(path, size)


BROKEN = {
    "empty file": (lambda path: _cut(path, 0), "an empty file"),
    "empty tar": (lambda path: write_tar(path, []), "an empty shard"),
    "in an image": (lambda path: _cut(path, 700), r"truncated, 'class\d/img\d+.jpg' at byte \d+"),
    "in the end mark": (lambda path: _cut(path, os.path.getsize(path) // 10240 * 10240 - 10240), "truncated"),
    "not a tar": (lambda path: path.write_bytes(b"x" * 20480), "no readable tar header"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08" + b"x" * 20480), "uncompressed tars"),
    "no image": (lambda path: write_tar(path, [("a.jpg", jpeg(0)), ("b.cls", b"1")]), "sample 'b' at byte .* no image"),
    "two images": (lambda path: write_tar(path, [("a.jpg", jpeg(0)), ("a.png", b"1")]), "more than one image"),
    "same name": (lambda path: write_tar(path, [("a.jpg", b"1"), ("a.JPG", b"2")]), "duplicate key 'a'"),
    "same key": (
        lambda path: write_tar(path, [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"3")]),
        "duplicate key 'a'",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_shards_are_rejected_by_name(shards: Path, name: str) -> None:
    damage, message = BROKEN[name]
    path = shards / "train-000001.tar"
    damage(path)
    with pytest.raises(ValueError, match=rf"train-000001.tar: .*{message}"):
        load_index(shards)
    assert not (shards / "index.npz").exists()


def test_broken_header_is_not_mistaken_for_the_end(shards: Path, index: Index) -> None:
    path = shards / "train-000001.tar"
    header = int(index.offset[35]) - 512
    with open(path, "r+b") as file:
        file.seek(header + 120)
        file.write(b"garbage!")
    (shards / "index.npz").unlink()
    with pytest.raises(ValueError, match=rf"train-000001.tar: no readable tar header .* at byte {header}"):
        load_index(shards)


def test_index_that_does_not_match_its_shards_is_rejected(shards: Path, index: Index) -> None:
    with open(shards / "train-000001.tar", "ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(ValueError, match=r"train-000001.tar: \d+ bytes, but the index .* --reindex"):
        load_index(shards)
    (shards / "train-000001.tar").rename(shards / "new.tar")
    with pytest.raises(ValueError, match=r"new.tar: the shard is not in the index .* --reindex"):
        load_index(shards)
    (shards / "new.tar").unlink()
    with pytest.raises(ValueError, match=r"train-000001.tar: the shard is missing, but is in the index"):
        load_index(shards)


def test_damaged_index_file_is_rejected(shards: Path, index: Index) -> None:
    _cut(shards / "index.npz", 700)
    with pytest.raises(ValueError, match=r"index.npz: not a readable index .* delete it"):
        load_index(shards)


def test_pickled_objects_in_an_index_file_are_not_loaded(shards: Path, index: Index) -> None:
    np.savez(shards / "index.npz", format=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="not a readable index"):
        load_index(shards)
