"""HEIC images are read if the extra `heif` is installed and are otherwise reported as unsupported."""

from pathlib import Path

import numpy as np
import pytest
from helpers.shard_tools import encode, jpeg, smooth_image, write_tar
from PIL import Image

from data import pack, verify
from data.decode import decode
from data.image_file import READS_HEIC, UNSUPPORTED, BadImage, open_image
from data.index import load_index
from data.loader import Loader

HEADER = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf"  # only the extra could write a whole file
HEIC = encode(smooth_image(3, 96, 64), "HEIF", quality=95) if READS_HEIC else HEADER + bytes(200)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (folder := tmp_path / "photos").mkdir()
    (folder / "IMG_1.HEIC").write_bytes(HEIC)
    for number in range(2, 5):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    return folder


@pytest.mark.skipif(not READS_HEIC, reason="the extra heif is not installed")
def test_heic_is_packed_verified_and_trained_on(photos: Path, tmp_path: Path) -> None:
    pixels = decode(HEIC, lambda width, height: (0, 0, width, height), (64, 96))
    assert np.abs(pixels.astype(int) - np.asarray(smooth_image(3, 96, 64))).mean() < 5  # chroma is halved
    shards = tmp_path / "shards"
    assert pack.main([str(photos), str(shards), "--num-workers", "1"]) == 0
    assert verify.main([str(shards), "--decode", "--num-workers", "1"]) == 0
    index = load_index(shards)
    with open(shards / index.shards[0], "rb") as file:
        assert b"IMG_1.heic" in file.read()
    (batch,) = next(Loader(index, size=(32, 32), batch=4, seed=0).batches(0, 1))
    assert "IMG_1" in batch.keys
    assert not batch.skipped


@pytest.mark.skipif(not READS_HEIC, reason="the extra heif is not installed")
def test_rotated_photograph_is_upright() -> None:
    """HEIC has its own rotation header, which every reader applies; the EXIF orientation is then 1."""
    exif = Image.Exif()
    exif[274] = 6
    image = open_image(encode(smooth_image(3, 96, 64), "HEIF", exif=exif.tobytes()))
    assert image.size == (64, 96)
    assert image.getexif().get(274, 1) == 1


@pytest.mark.skipif(READS_HEIC, reason="the extra heif is installed")
def test_heic_is_unsupported_without_the_extra(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        BadImage, match=r"a HEIC image: the extra `heif` reads it \(pip install 'lomar-deepspeed"
    ) as caught:
        open_image(HEIC)
    assert caught.value.kind == UNSUPPORTED
    assert pack.main([str(photos), str(tmp_path / "refused"), "--num-workers", "1"]) == 1
    assert "1 of 4 files are not readable images (1 unsupported)" in capsys.readouterr().err
    (shards := tmp_path / "shards").mkdir()
    write_tar(shards / "0.tar", [(path.name, path.read_bytes()) for path in sorted(photos.iterdir())])
    assert verify.main([str(shards), "--decode", "--num-workers", "1"]) == 1
    assert "cannot be decoded (unsupported): a HEIC image: the extra `heif`" in capsys.readouterr().err
    (batch,) = next(Loader(load_index(shards), size=(32, 32), batch=4, seed=0).batches(0, 1))
    assert [(problem.key, problem.kind) for problem in batch.skipped] == [("IMG_1", UNSUPPORTED)]
