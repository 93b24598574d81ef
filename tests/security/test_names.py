"""Names in archives, caches and checkpoints cannot lead to a file outside their folder."""

import json
import os
from pathlib import Path

import pytest
from helpers.shard_tools import jpeg, write_tar

from data.index import load_index
from data.reader import ShardReader
from data.sources import make_key
from data.storage.cache import CacheSettings, ShardCache
from data.storage.client import Object
from data.storage.location import Remote
from pretrain.trainer.checkpoint_layout import checkpoint_names, latest_checkpoint

OUTSIDE = ("../outside", "/outside", "a/../../outside", "..")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", [f"{name}/image" for name in OUTSIDE])
def test_members_named_outside_the_folder_are_read_from_the_shard(name: str, tmp_path: Path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "outside.jpg").write_bytes(b"not this")
    image = jpeg(0)
    write_tar(tmp_path / "shards" / "a.tar", [(f"{name}.jpg", image), (f"{name}.cls", b"0")])
    before = files(tmp_path)
    index = load_index(tmp_path / "shards")
    assert [ShardReader(index).read(sample) for sample in range(len(index))] == [image] * len(index)
    assert files(tmp_path) - before <= {"shards/index.npz"}


@pytest.mark.parametrize("name", OUTSIDE)
def test_packed_shards_have_member_names_below_their_folder(name: str):
    """So unpacking our shards is safe as well."""
    key = make_key(f"{name}/image.jpg")
    assert ".." not in key.split("/")
    assert not key.startswith("/")


@pytest.mark.parametrize("name", OUTSIDE)
def test_fetched_shards_stay_in_the_cache_folder(name: str, tmp_path: Path):
    cache = ShardCache(CacheSettings(str(tmp_path / "cache"), 1.0, 3.0))
    path = cache.path(Remote("https", "host", f"shards/{name}"), Object(1, "v"))
    assert path.parent == cache.folder
    assert os.path.normpath(path) == str(path)


@pytest.mark.parametrize("name", [*OUTSIDE, "../../elsewhere/step_00000007"])
def test_latest_can_only_name_a_checkpoint_of_its_run(name: str, tmp_path: Path):
    (tmp_path / "elsewhere" / "step_00000007").mkdir(parents=True)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step_00000005").mkdir(parents=True)
    (folder / "step_00000005" / "manifest.json").write_text(json.dumps({"state": {}, "files": {}}))
    (folder / "latest").write_text(name)
    assert checkpoint_names(folder) == ["step_00000005"]
    assert latest_checkpoint(folder) == folder / "step_00000005"
