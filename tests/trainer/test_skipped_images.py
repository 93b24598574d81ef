"""Images that cannot be decoded are listed and counted by kind, up to a maximum number or share."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from data.batch import Skipped
from pretrain.trainer.data_config import DataConfig
from pretrain.trainer.skipped_images import SkippedImages

CUT, EMPTY = Skipped("a\udcdf\nb", "damaged", "image file is truncated"), Skipped("c", "empty", "an empty file")


def test_each_skipped_image_is_a_line_of_key_kind_and_reason(tmp_path: Path):
    path = tmp_path / "skipped_images.txt"
    skipped = SkippedImages(path, 3, 100)
    assert skipped.add([], 8) == 0
    assert not path.exists()
    assert skipped.add([CUT, EMPTY], 8) == 2
    assert skipped.add([CUT], 8) == 1
    cut = "a\\xdf\\nb\tdamaged\timage file is truncated\n"
    assert path.read_text("utf-8") == cut + "c\tempty\tan empty file\n" + cut
    with pytest.raises(
        ValueError, match=r"4 of 32 images .* \(3 damaged, 1 empty\), .*data\.max_skipped_images=3; .*txt"
    ):
        skipped.add([CUT], 8)


def test_share_is_of_one_epoch_and_then_of_all_images_read(tmp_path: Path):
    skipped = SkippedImages(tmp_path / "list", 0.02, 100)
    assert skipped.add([CUT, CUT], 2) == 2  # two of the first epoch's hundred
    for _ in range(18):
        skipped.add([], 10)
    assert skipped.add([CUT, CUT], 18) == 2  # four of 200
    with pytest.raises(ValueError, match=r"5 of 202 .*data\.max_skipped_images=0\.02"):
        skipped.add([EMPTY], 2)


def test_zero_as_number_or_share_allows_no_skipped_image(tmp_path: Path):
    for zero in (0, 0.0):
        with pytest.raises(ValueError, match="1 of 8 images"):
            SkippedImages(tmp_path / "list", zero, 100).add([CUT], 8)


def test_key_takes_a_number_or_a_share():
    for value in (0, 1, 1000, 0.01):
        read = DataConfig(shards="x", max_skipped_images=value).max_skipped_images
        assert (read, type(read)) == (value, type(value))
    for value in (-1, 1.5, -0.1):
        with pytest.raises(ValidationError):
            DataConfig(shards="x", max_skipped_images=value)
