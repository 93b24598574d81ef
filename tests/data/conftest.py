from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.shard_tools import jpeg, write_tar
from helpers.time_limit import time_limit

from data.index import Index, load_index

SECONDS = 120


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    with time_limit(SECONDS):
        yield


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """53 samples in three shards of different sizes, with images of different shapes."""
    folder = tmp_path / "shards"
    folder.mkdir()
    start = 0
    for number, count in enumerate((30, 16, 7)):
        members = []
        for sample in range(start, start + count):
            members.append((f"class{sample % 3}/img{sample:03d}.jpg", jpeg(sample, 40 + sample, 90 - sample)))
            members.append((f"class{sample % 3}/img{sample:03d}.cls", str(sample % 3).encode()))
        write_tar(folder / f"train-{number:06d}.tar", members)
        start += count
    return folder


@pytest.fixture
def index(shards: Path) -> Index:
    return load_index(shards)
