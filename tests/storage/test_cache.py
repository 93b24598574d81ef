import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from helpers.file_server import FileServer

import data.storage.cache
from data.storage import client, fetch
from data.storage.cache import CacheSettings, ShardCache, unpin
from data.storage.client import Object, StoreError
from data.storage.files import look_up
from data.storage.location import Remote, parse_url

SPAWN = multiprocessing.get_context("spawn")  # store clients do not work in forked processes
Shard = tuple[Remote, Object]


@pytest.fixture
def stored(server: FileServer) -> list[Shard]:
    remotes = [parse_url(f"{server.url}/shards/t-{number}.tar") for number in range(6)]
    return [(remote, look_up(remote)) for remote in remotes]


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def shard_names(folder: Path) -> list[str]:
    """Returns the names of the cached shards without their digests, such as `t0`."""
    return sorted(path.name.split("-")[0] + path.name.split("-")[1] for path in folder.glob("*.tar"))


def pin(cache: ShardCache, shard: Shard) -> int:
    descriptor = cache.pin(*shard)
    assert descriptor is not None
    return descriptor


def test_shard_is_fetched_once_and_kept(server: FileServer, stored: list[Shard], cache: CacheSettings) -> None:
    first, second = ShardCache(cache), ShardCache(cache)
    descriptor = pin(first, stored[0])
    content = (server.folder / "shards" / "t-0.tar").read_bytes()
    assert os.pread(descriptor, len(content) + 1, 0) == content
    assert first.path(*stored[0]).read_bytes() == content
    unpin(descriptor)
    unpin(pin(second, stored[0]))
    assert server.gets["t-0.tar"] == 1
    assert not list(first.folder.glob(".*.part"))


def fetch_all(settings: CacheSettings, stored: list[Shard], barrier: "multiprocessing.synchronize.Barrier") -> None:
    cache = ShardCache(settings)
    barrier.wait(30)
    for shard in stored:
        pin(cache, shard)


def test_processes_on_a_node_fetch_each_shard_once(
    server: FileServer, stored: list[Shard], cache: CacheSettings
) -> None:
    server.delay = 0.05  # so that the downloads overlap
    barrier = SPAWN.Barrier(3)
    processes = [SPAWN.Process(target=fetch_all, args=(cache, stored, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(40)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert {name: count for name, count in server.gets.items() if count} == {f"t-{n}.tar": 1 for n in range(6)}


def fetch_one(settings: CacheSettings, shard: Shard) -> None:
    ShardCache(settings).pin(*shard)


def test_killed_download_leaves_no_lock_and_no_usable_file(
    server: FileServer, stored: list[Shard], cache: CacheSettings
) -> None:
    server.faults["t-0.tar"], server.stall = ["stall"], 30.0
    process = SPAWN.Process(target=fetch_one, args=(cache, stored[0]))
    process.start()
    node = ShardCache(cache)
    while not list(node.folder.glob(".*.part")) or not server.gets["t-0.tar"]:
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert not shard_names(node.folder)
    start = time.monotonic()
    descriptor = pin(node, stored[0])
    assert os.fstat(descriptor).st_size == stored[0][1].size
    assert time.monotonic() - start < 5
    assert node.path(*stored[0]).read_bytes() == (server.folder / "shards" / "t-0.tar").read_bytes()
    assert not list(node.folder.glob(".*.part"))


def test_leftover_of_a_killed_process_is_deleted_by_the_next_fetch(
    server: FileServer, stored: list[Shard], cache: CacheSettings
) -> None:
    node = ShardCache(cache)
    node.folder.mkdir(parents=True)
    leftover = node.folder / ".t-9-0123.tar.part"
    leftover.write_bytes(bytes(1000))
    unpin(pin(node, stored[0]))
    assert not leftover.exists()


def cache_with_room_for(settings: CacheSettings, stored: list[Shard], shards: float) -> ShardCache:
    return ShardCache(CacheSettings(settings.folder, shards * max(info.size for _, info in stored) / 1e9, 1.0))


def test_least_recently_used_shard_is_evicted(server: FileServer, stored: list[Shard], cache: CacheSettings) -> None:
    node = cache_with_room_for(cache, stored, 3)
    for number in (0, 1, 2, 0, 3):  # 1 is the least recently used when 3 arrives
        unpin(pin(node, stored[number]))
        time.sleep(0.02)
        assert bytes_in(node.folder) <= node.settings.limit
    assert shard_names(node.folder) == ["t0", "t2", "t3"]


def test_pinned_shards_are_never_evicted(server: FileServer, stored: list[Shard], cache: CacheSettings) -> None:
    node = cache_with_room_for(cache, stored, 2)
    held = pin(node, stored[0])
    for number in (1, 2, 3):
        unpin(pin(node, stored[number]))
    assert shard_names(node.folder) == ["t0", "t3"]
    other = pin(node, stored[4])
    with pytest.raises(StoreError, match=r"t-5.tar: no room for its .* GB in .*data.cache_gb"):
        node.pin(*stored[5])
    assert not list(node.folder.glob(".*.part"))
    unpin(held)
    unpin(pin(node, stored[5]))
    assert shard_names(node.folder) == ["t4", "t5"]
    unpin(other)


def test_forked_child_does_not_keep_shards_pinned(
    server: FileServer, stored: list[Shard], cache: CacheSettings
) -> None:
    node = cache_with_room_for(cache, stored, 1)
    held = pin(node, stored[0])
    child = os.fork()
    if not child:
        time.sleep(30)
        os._exit(0)
    unpin(held)
    unpin(pin(node, stored[1]))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert shard_names(node.folder) == ["t1"]


def test_changed_shard_is_rejected_and_its_new_version_gets_another_name(
    server: FileServer, stored: list[Shard], cache: CacheSettings, shards: Path
) -> None:
    node = ShardCache(cache)
    unpin(pin(node, stored[0]))
    (shards / "t-1.tar").write_bytes((shards / "t-1.tar").read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match=r"t-1.tar: has changed"):
        node.pin(*stored[1])
    assert shard_names(node.folder) == ["t0"]
    remote = stored[1][0]
    unpin(pin(node, (remote, look_up(remote))))
    assert node.path(*stored[1]) != node.path(remote, look_up(remote))


def test_truncated_cache_file_is_fetched_again(server: FileServer, stored: list[Shard], cache: CacheSettings) -> None:
    node = ShardCache(cache)
    unpin(pin(node, stored[0]))
    os.truncate(node.path(*stored[0]), 100)
    assert os.fstat(pin(node, stored[0])).st_size == stored[0][1].size


def test_full_disk_is_reported(
    server: FileServer, stored: list[Shard], cache: CacheSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError, match=r"the disk or quota is full while fetching .*t-0.tar"):
        ShardCache(cache).pin(*stored[0])
    assert not shard_names(Path(cache.folder))


def test_short_write_loses_nothing(
    server: FileServer, stored: list[Shard], cache: CacheSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A nearly full disk takes a part of the bytes, and then another process may free some room."""
    monkeypatch.setattr(client, "CHUNK", 1000)  # several chunks, so that those after the short write could be shifted
    write, asked = os.pwrite, list[int]()

    def short_once(descriptor: int, content: memoryview, position: int) -> int:
        asked.append(len(content))
        return write(descriptor, content[: len(content) // 2] if len(asked) == 1 else content, position)

    monkeypatch.setattr(os, "pwrite", short_once)
    node = ShardCache(cache)
    unpin(pin(node, stored[0]))
    assert len(asked) > 2
    assert node.path(*stored[0]).read_bytes() == (server.folder / "shards" / "t-0.tar").read_bytes()


def test_incomplete_shard_is_not_cached(
    stored: list[Shard], cache: CacheSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.storage.cache, "download", lambda *_: iter([b"x" * 100]))
    with pytest.raises(StoreError, match=r"t-0\.tar: 100 bytes arrived instead of \d+"):
        ShardCache(cache).pin(*stored[0])
    assert not list(Path(cache.folder).glob("*.tar"))
    assert not list(Path(cache.folder).glob(".*.part"))


def test_folder_that_cannot_be_created_is_reported(stored: list[Shard], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot create this folder for shards .*: set data.cache_dir"):
        ShardCache(CacheSettings(str(tmp_path / "file" / "x"))).pin(*stored[0])


def test_flaky_storage_is_retried(
    server: FileServer, stored: list[Shard], cache: CacheSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(client, "CHUNK", 1000)
    server.faults["*"] = [503, "truncate", "reset", "truncate", 429, 500] * 3
    node = ShardCache(cache)
    for remote, info in stored:
        unpin(pin(node, (remote, info)))
        assert node.path(remote, info).read_bytes() == (server.folder / "shards" / remote.name).read_bytes()
