"""Shards in a store have the same index, batches and verification as local shards."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import s3_server
from helpers.file_server import FileServer
from helpers.shard_tools import jpeg, write_tar

from data import index as index_command
from data import verify
from data.batch import Batch
from data.eval_loader import EvalLoader
from data.index import Index, load_index
from data.loader import Loader
from data.reader import ShardReader
from data.storage.cache import CacheSettings

SETTINGS = {"size": (16, 16), "batch": 8, "seed": 5}


@pytest.fixture
def local(shards: Path) -> Index:
    index = load_index(shards)
    (shards / "index.npz").unlink()  # the served shards have no index yet
    return index


@pytest.fixture
def remote(local: Index, url: str, cache: CacheSettings) -> Index:
    assert index_command.main([url]) == 0
    return load_index(url, cache)


def batches(index: Index, start: int = 0, stop: int = 12, **settings: int) -> list[Batch]:
    return [batch for (batch,) in Loader(index, **SETTINGS, **settings).batches(start, stop)]


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys == theirs.keys
        assert torch.equal(mine.images, theirs.images)


def test_index_is_built_once_and_stored_next_to_the_shards(
    local: Index, url: str, server: FileServer, cache: CacheSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"no index of these shards .* make it once with `python -m data.index http"):
        load_index(url, cache)
    assert index_command.main([url]) == 0
    assert "45 samples in 6 shards; the index is http://127.0.0.1" in capsys.readouterr().out
    assert all(server.gets[f"t-{number}.tar"] == 1 for number in range(6))
    index = load_index(url, cache)
    assert index.fingerprint == local.fingerprint  # a run can resume with either
    assert list(index.keys) == list(local.keys)
    assert index.label.tolist() == local.label.tolist()
    assert all(index.versions)
    load_index(url, cache)
    assert server.gets["t-0.tar"] == 1


@pytest.mark.parametrize("size", [0, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_equal_those_of_local_shards(
    local: Index, remote: Index, server: FileServer, size: int, workers: int
) -> None:
    expected = batches(local, shuffle_shards=size)
    server.gets.clear()
    assert_same(expected, batches(remote, shuffle_shards=size, num_workers=workers))
    assert_same(expected[7:], batches(remote, 7, shuffle_shards=size, num_workers=workers))
    assert max(server.gets.values()) == 1


def test_cache_with_room_for_a_few_groups_is_enough(local: Index, remote: Index, tmp_path: Path) -> None:
    """There is room for four of the six shards, and each group is one shard."""
    room = int(np.sort(remote.shard_bytes)[-4:].sum())
    object.__setattr__(remote, "cache", CacheSettings(str(tmp_path / "small"), room / 1e9, 5.0))
    used = []
    loader = Loader(remote, **{**SETTINGS, "batch": 3}, shuffle_shards=1)
    seen = []
    for (batch,) in loader.batches(0, 30):
        used.append(sum(path.stat().st_size for path in (tmp_path / "small").iterdir()))
        seen.append(batch)
    assert max(used) <= room
    expected = Loader(local, **{**SETTINGS, "batch": 3}, shuffle_shards=1)
    assert_same([batch for (batch,) in expected.batches(0, 30)], seen)


def test_too_small_cache_is_rejected_before_training(remote: Index, tmp_path: Path) -> None:
    object.__setattr__(remote, "cache", CacheSettings(str(tmp_path / "small"), 0.00001, 5.0))
    message = (
        r"data.cache_gb=1e-05 is not enough .* 3 groups of data.shuffle_shards=2 are needed .* data.cache_gb to at"
    )
    with pytest.raises(ValueError, match=message):
        Loader(remote, **SETTINGS, shuffle_shards=2)
    room = int(remote.shard_bytes.sum()) - 1
    object.__setattr__(remote, "cache", CacheSettings(str(tmp_path / "small"), room / 1e9, 5.0))
    with pytest.raises(ValueError, match=r"shuffle_shards=0 shuffles all .* set data.shuffle_shards=2, or"):
        Loader(remote, **{**SETTINGS, "batch": 2})


@pytest.mark.parametrize("workers", [0, 1])
def test_missing_shard_ends_the_run_and_is_named(remote: Index, server: FileServer, workers: int, shards: Path) -> None:
    shard = batches(remote, 0, 1, shuffle_shards=6)[0].samples[0].item()
    name = remote.shards[remote.shard_of(shard)]
    for path in Path(remote.cache.folder).glob("*.tar"):
        path.unlink()
    (shards / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}: not found in the store \(404\)"):
        batches(remote, shuffle_shards=6, num_workers=workers)


def test_changed_shard_ends_the_run_and_is_named(remote: Index, shards: Path) -> None:
    (shards / "t-3.tar").write_bytes((shards / "t-3.tar").read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"t-3.tar: has changed in the store since its index was made"):
        batches(remote, shuffle_shards=2)


def test_undecodable_image_is_replaced_from_its_own_shard(tmp_path: Path) -> None:
    """Other shards may not be in the cache."""
    for shard in range(3):
        members = [(f"{shard}{n}.jpg", b"nothing" if n == 3 else jpeg(n)) for n in range(4)]
        write_tar(tmp_path / f"{shard}.tar", members)
    index = load_index(tmp_path)
    for (batch,) in Loader(index, **{**SETTINGS, "batch": 6}, shuffle_shards=1).batches(0, 2):
        assert not {3, 7, 11} & set(batch.samples.tolist())
        assert {key[1:] for key, _, _ in batch.skipped} <= {"3"}
    shown = torch.cat([b.samples for (b,) in Loader(index, **{**SETTINGS, "batch": 6}, shuffle_shards=1).batches(0, 2)])
    assert sorted(shown.tolist()) == [0, 0, 1, 2, 4, 4, 5, 6, 8, 8, 9, 10]


@pytest.mark.parametrize("workers", [0, 2])
def test_eval_loader_reads_each_sample_of_its_rank_once(remote: Index, workers: int) -> None:
    loader = EvalLoader(remote, size=(16, 16), batch=4, rank=1, world_size=2, num_workers=workers)
    seen = torch.cat([batch.samples for batch in loader.batches()])
    assert seen[seen >= 0].tolist() == [n for n in range(45) if n // 4 % 2]
    assert all(batch.readable.sum() == (batch.samples >= 0).sum() for batch in loader.batches())


def test_single_sample_equals_the_local_one(local: Index, remote: Index) -> None:
    assert ShardReader(remote).read(20) == ShardReader(local).read(20)


def test_verify_checks_shards_in_a_store(
    remote: Index, url: str, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main([url, "--decode", "--num-workers", "1"]) == 0
    assert capsys.readouterr().out.endswith("ok\n")
    content = bytearray((shards / "t-2.tar").read_bytes())
    content[int(remote.offset[16]) + 200 : int(remote.offset[16]) + 400] = bytes(200)
    (shards / "t-2.tar").write_bytes(content)
    assert verify.main([url, "--num-workers", "1"]) == 1
    assert "t-2.tar: version " in capsys.readouterr().err
    assert verify.main([url, "--reindex", "--num-workers", "1"]) == 0


def test_unusable_shards_are_named(
    url: str, shards: Path, server: FileServer, capsys: pytest.CaptureFixture[str]
) -> None:
    (shards / "t-1.tar").write_bytes((shards / "t-1.tar").read_bytes()[:3000])
    (shards / "t-4.tar").write_bytes(b"\x1f\x8b" + bytes(1000))
    assert index_command.main([url]) == 1
    error = capsys.readouterr().err
    assert "2 of 6 shards cannot be used" in error
    assert f"{server.url}/shards/t-1.tar: truncated" in error
    assert "t-4.tar: compressed" in error
    assert index_command.main([f"{server.url}/shards"]) == 1
    assert "cannot list files" in capsys.readouterr().err


# S3


@pytest.fixture
def bucket(local: Index, shards: Path) -> Iterator[str]:
    with s3_server.serve_s3():
        s3_server.put_folder(shards, "train")
        yield "s3://bucket/train"


def test_s3_index_batches_and_verify(local: Index, bucket: str, cache: CacheSettings) -> None:
    assert index_command.main([bucket]) == 0
    assert "train/index.npz" in s3_server.names("train")
    remote = load_index(bucket, cache)
    assert remote.fingerprint == local.fingerprint
    assert_same(batches(local, shuffle_shards=3), batches(remote, shuffle_shards=3, num_workers=2))
    assert verify.main([bucket, "--num-workers", "1"]) == 0


def test_s3_errors_name_added_removed_and_changed_shards(bucket: str, cache: CacheSettings, shards: Path) -> None:
    assert index_command.main([bucket]) == 0
    content = (shards / "t-0.tar").read_bytes()
    client = s3_server.client()
    client.put_object(Bucket="bucket", Key="train/t-9.tar", Body=content)
    client.delete_object(Bucket="bucket", Key="train/t-1.tar")
    with pytest.raises(ValueError, match=r"(?s)t-1.tar: the shard is missing, but is in the index.*t-9.tar: .* not in"):
        load_index(bucket, cache)
    with pytest.raises(ValueError, match=r"(?s)no index of these shards|t-1.tar: no such shard"):
        load_index(f"{bucket}/t-{{0..1}}.tar", cache)
    client.delete_object(Bucket="bucket", Key="train/t-9.tar")
    client.put_object(Bucket="bucket", Key="train/t-1.tar", Body=content)
    with pytest.raises(ValueError, match=r"t-1.tar: \S+ .*, but the index s3://bucket/train/index.npz says"):
        load_index(bucket, cache)


def test_index_that_cannot_be_uploaded_is_kept_locally(
    bucket: str, cache: CacheSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from data.storage.client import Store, StoreError

    def deny(*arguments: object) -> None:
        raise StoreError("the store denies access (403)")

    monkeypatch.setattr(Store, "write", deny)
    assert index_command.main([bucket]) == 0
    assert "index.npz, as it could not be written next to the shards (the store denies" in capsys.readouterr().out
    assert len(load_index(bucket, cache)) == 45


def test_nonexistent_s3_locations_are_rejected(bucket: str, cache: CacheSettings) -> None:
    with pytest.raises(ValueError, match=r"s3://bucket/nothing: no shards \(\*.tar\) in this folder"):
        load_index("s3://bucket/nothing", cache)
    with pytest.raises(ValueError, match=r"s3://other/x: not found in the store \(404\)"):
        load_index("s3://other/x", cache)


def test_s3_without_credentials_is_an_error(cache: CacheSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """No instance role either: the metadata endpoint refuses connections, and there must be no long wait for it."""
    for name in s3_server.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("data.storage.fetch.FIRST_PAUSE", 0.01)
    with pytest.raises(ValueError, match=r"s3://bucket/x"):
        load_index("s3://bucket/x", CacheSettings(cache.folder, 1.0, 1.0))
    assert "AWS_ACCESS_KEY_ID" not in os.environ
