"""Some six hundred malformed or odd files: packing, verifying and training find the same of each."""

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.odd_images import EITHER, READ, odd_images
from helpers.odd_tars import PHOTO, odd_tars
from helpers.shard_tools import write_tar

from data import verify
from data.image_file import EMPTY
from data.index import Index, load_index
from data.loader import Loader
from data.pack import REJECTED_FILE, pack
from data.sources import list_source

SECONDS = 20
IMAGES = {image.name: image for image in odd_images()}
TARS = {tar.name: tar for tar in odd_tars()}
Refused = dict[str, tuple[str, str]]  # key -> kind and reason


@pytest.fixture(autouse=True)
def soon(no_hang: None) -> None:
    """Sooner than other tests: each of these reads one small file."""
    signal.alarm(SECONDS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests: to make and to delete a folder for each takes longer than they do."""
    return tmp_path_factory.mktemp("odd")


@pytest.fixture
def folder(root: Path) -> Iterator[Path]:
    """An empty one; fails if something was written beside it."""
    inside = root / "a" / "b" / "c" / "d" / "inside"
    inside.mkdir(parents=True, exist_ok=True)
    yield inside
    for path in list(inside.iterdir()):
        path.unlink()
    assert sorted(path.name for path in root.rglob("*")) == ["a", "b", "c", "d", "inside"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, Refused]:
    """All images as `pack` takes them, and why it does not."""
    folder = tmp_path_factory.mktemp("packed")
    (folder / "photos").mkdir()
    for image in IMAGES.values():
        (folder / "photos" / image.name).write_bytes(image.data)
    index = pack(list_source(folder / "photos"), folder / "shards", bad="skip")
    lines = (folder / "shards" / REJECTED_FILE).read_text("utf-8").splitlines()
    return index, {Path(name).stem: (kind, reason) for name, kind, reason in (line.split("\t") for line in lines)}


def verified(shards: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """The exit code of `verify`, and what it says is wrong."""
    capsys.readouterr()
    return verify.main([str(shards), "--num-workers", "1", *options]), capsys.readouterr().err


def trained(index: Index) -> Refused:
    """What the training's loader skips in an epoch, with small crops and smaller ones, for which JPEGs are reduced."""
    found = []
    for size in (48, 8):
        loader = Loader(index, size=(size, size), batch=len(index), seed=0)
        ((batch,),) = loader.batches(0, 1)
        assert len(batch.samples) == len(index)
        found.append({key: (kind, reason) for key, kind, reason in batch.skipped})
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize("name", IMAGES)
def test_all_find_the_same_of_an_image(
    name: str, packed: tuple[Index, Refused], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, key = IMAGES[name], Path(name).stem
    kind, reason = packed[1].get(key, (READ, ""))
    assert image.kind in (kind, EITHER), reason
    write_tar(folder / "a.tar", [("good.jpg", PHOTO), (f"{key}.{name.rpartition('.')[2]}", image.data)])
    assert trained(load_index(folder)) == ({key: (kind, reason)} if kind else {})
    code, wrong = verified(folder, capsys, "--decode")
    assert (code, f"'{key}' at byte" in wrong) == ((1, True) if kind else (0, False))
    assert not kind or f"cannot be decoded ({kind}): {reason}" in wrong
    code, wrong = verified(folder, capsys)
    assert (code, f"'{key}' at byte" in wrong) == ((1, True) if kind == EMPTY else (0, False))


def test_what_is_packed_is_read(packed: tuple[Index, Refused], capsys: pytest.CaptureFixture[str]) -> None:
    index, rejected = packed
    keys = {Path(name).stem for name in IMAGES}
    assert (set(index.keys), len(index)) == (keys - rejected.keys(), len(keys) - len(rejected))
    assert trained(index) == {}
    assert verified(index.root, capsys, "--decode") == (0, "")


@pytest.mark.parametrize("name", TARS)
def test_all_find_the_same_of_a_tar(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = TARS[name]
    (folder / name).write_bytes(tar.data)
    if tar.refused:
        with pytest.raises(ValueError, match=tar.refused) as caught:
            load_index(folder)
        assert str(caught.value).startswith(f"{folder / name}: ")
        assert len(str(caught.value)) < 1000
        for options in ((), ("--decode",)):
            code, wrong = verified(folder, capsys, *options)
            assert (code, bool(re.search(tar.refused, wrong)), wrong.count("\n")) == (1, True, 1)
        return
    index = load_index(folder)
    assert tuple(index.keys) == tar.keys
    assert tar.labels is None or tuple(index.label.tolist()) == tar.labels
    skipped = trained(index)
    assert {kind for kind, _ in skipped.values()} <= {EMPTY}
    for options in ((), ("--decode",)):
        code, wrong = verified(folder, capsys, *options)
        assert (code, wrong.count("wrong: ")) == (bool(skipped), len(skipped)), wrong


def test_there_are_enough_and_they_are_the_same_every_time() -> None:
    assert len(IMAGES) >= 400
    assert len(TARS) >= 170
    assert {image.name: image for image in odd_images()} == IMAGES
    assert {tar.name: tar for tar in odd_tars()} == TARS
