from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.file_server import FileServer, serve
from helpers.shard_tools import jpeg, write_tar
from helpers.time_limit import time_limit

from data.storage.cache import CacheSettings
from data.storage.client import open_store

SECONDS = 60


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    with time_limit(SECONDS):
        yield


@pytest.fixture(autouse=True)
def own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gives each test its own cache folders and credentials, and no store clients from other tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    open_store.cache_clear()
    yield
    open_store.cache_clear()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """45 samples in six shards of 7 or 8 samples, inside the folder that `server` serves."""
    folder = tmp_path / "served" / "shards"
    folder.mkdir(parents=True)
    number = 0
    for shard in range(6):
        members = []
        for _ in range(7 + shard % 2):
            members.append((f"i{number:03d}.jpg", jpeg(number, 40 + number, 60)))
            members.append((f"i{number:03d}.cls", str(number % 3).encode()))
            number += 1
        write_tar(folder / f"t-{shard}.tar", members)
    return folder


@pytest.fixture
def server(shards: Path) -> Iterator[FileServer]:
    """Serves the folder above `shards`."""
    with serve(shards.parent) as running:
        yield running


@pytest.fixture
def url(server: FileServer) -> str:
    """Brace pattern of the shards' URLs."""
    return f"{server.url}/shards/t-{{0..5}}.tar"


@pytest.fixture
def cache(tmp_path: Path) -> CacheSettings:
    """Settings of a cache with room for every shard and a short timeout."""
    return CacheSettings(str(tmp_path / "node"), 1.0, 3.0)
