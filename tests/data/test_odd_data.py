"""About six hundred malformed or unusual files: packing, verifying and training agree on each of them."""

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
Rejections = dict[str, tuple[str, str]]  # key -> kind and reason


@pytest.fixture(autouse=True)
def short_time_limit(no_hang: None) -> None:
    """A shorter limit than for other tests: each of these reads one small file."""
    signal.alarm(SECONDS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all tests: creating and deleting one for each takes longer than the tests."""
    return tmp_path_factory.mktemp("odd")


@pytest.fixture
def folder(root: Path) -> Iterator[Path]:
    """An empty folder; fails the test if anything was written outside it."""
    inside = root / "a" / "b" / "c" / "d" / "inside"
    inside.mkdir(parents=True, exist_ok=True)
    yield inside
    for path in list(inside.iterdir()):
        path.unlink()
    assert sorted(path.name for path in root.rglob("*")) == ["a", "b", "c", "d", "inside"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, Rejections]:
    """The index of all images that `pack` accepts, and its reasons for rejecting the others."""
    folder = tmp_path_factory.mktemp("packed")
    (folder / "photos").mkdir()
    for image in IMAGES.values():
        (folder / "photos" / image.name).write_bytes(image.data)
    index = pack(list_source(folder / "photos"), folder / "shards", bad="skip")
    lines = (folder / "shards" / REJECTED_FILE).read_text("utf-8").splitlines()
    return index, {Path(name).stem: (kind, reason) for name, kind, reason in (line.split("\t") for line in lines)}


def verified(shards: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """Runs `verify`; returns its exit code and its stderr."""
    capsys.readouterr()
    return verify.main([str(shards), "--num-workers", "1", *options]), capsys.readouterr().err


def trained(index: Index) -> Rejections:
    """Returns what the training loader skips in one epoch, at two crop sizes (the smaller decodes reduced JPEGs)."""
    found = []
    for size in (48, 8):
        loader = Loader(index, size=(size, size), batch=len(index), seed=0)
        ((batch,),) = loader.batches(0, 1)
        assert len(batch.samples) == len(index)
        found.append({key: (kind, reason) for key, kind, reason in batch.skipped})
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize("name", IMAGES)
def test_pack_verify_and_training_agree_on_an_image(
    name: str, packed: tuple[Index, Rejections], folder: Path, capsys: pytest.CaptureFixture[str]
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


def test_packed_images_are_all_readable(packed: tuple[Index, Rejections], capsys: pytest.CaptureFixture[str]) -> None:
    index, rejected = packed
    keys = {Path(name).stem for name in IMAGES}
    assert (set(index.keys), len(index)) == (keys - rejected.keys(), len(keys) - len(rejected))
    assert trained(index) == {}
    assert verified(index.root, capsys, "--decode") == (0, "")


@pytest.mark.parametrize("name", TARS)
def test_index_verify_and_training_agree_on_a_tar(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_odd_files_are_numerous_and_reproducible() -> None:
    assert len(IMAGES) >= 400
    assert len(TARS) >= 170
    assert {image.name: image for image in odd_images()} == IMAGES
    assert {tar.name: tar for tar in odd_tars()} == TARS
