"""benchmarks/loader.py: every pipeline gets the same photographs, and the last line has every ratio."""

import json
from pathlib import Path

import pytest
import torch
from helpers.shard_tools import jpeg, write_tar

from benchmarks import loader
from data.index import load_index
from data.loader import Loader
from data.transforms import Augmentation


def test_last_line_has_every_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = tmp_path / "photographs.tar"
    write_tar(tar, [(f"n{i}/{i}.JPEG", jpeg(i, 400 + i, 300)) for i in range(10)] + [("n0/about.txt", b"none")])
    loader.main([str(tar), "--quick"])
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    assert figures["photographs"] == 10
    for name in ("ratio_224", "ratio_448", "ratio_224_repeats2", "ratio_224_packed288", "share_of_limit_224"):
        assert figures[name] > 0
    assert lines[1].split()[-6:] == ["ours", "ours_packed288", "ours_repeats2", "usual", "limit", "limit_packed288"]


def test_tar_without_photographs_is_rejected(tmp_path: Path) -> None:
    write_tar(tmp_path / "none.tar", [("a.txt", b"none")])
    with pytest.raises(SystemExit, match="0 photographs, but at least 8 are needed"):
        loader.main([str(tmp_path / "none.tar")])


def test_ratios_are_medians_of_rounds() -> None:
    names = ("ours", "ours_packed288", "ours_repeats2", "usual", "limit", "limit_packed288")
    rounds = [dict.fromkeys(names, 1.0) | {"usual": usual, "ours": 2.0} for usual in (2.0, 3.0, 40.0)]
    figures = loader.summarize({224: rounds, 448: rounds})
    assert (figures["ratio_224"], figures["ratio_224_packed288"], figures["share_of_limit_224"]) == (1.5, 3.0, 0.5)
    assert figures["usual_448_per_s"] == 0.3


def test_usual_pipeline_takes_the_same_crops_as_ours(tmp_path: Path) -> None:
    """The usual pipeline flips at random, so either direction matches."""
    tar = tmp_path / "photographs.tar"
    write_tar(tar, [(f"{i}.jpg", jpeg(i, 400 + i, 300)) for i in range(8)])
    (folder := tmp_path / "photographs").mkdir()
    loader.extract(tar, folder, None)
    index = load_index(tar)
    (batch,) = next(Loader(index, size=(64, 64), batch=8, seed=3, augmentations=(Augmentation(flip=0),)).batches(0, 1))
    torch.manual_seed(0)
    files = sorted(folder.iterdir())
    crops = loader.usual(files, 64, 3)(batch.samples.tolist())
    mean, std = (torch.tensor(values)[:, None, None] for values in (loader.MEAN, loader.STD))
    for ours, usual in zip(batch.images, crops, strict=True):
        same = (usual * std + mean).mul(255).permute(1, 2, 0)
        assert min((same - pixels.float()).abs().mean() for pixels in (ours, ours.flip(1))) < 1
