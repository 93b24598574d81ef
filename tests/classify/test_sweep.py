"""Tests of hyperparameter grids: their settings, rejected grids, the summary and a real run."""

import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from data.pack import pack
from data.sources import list_source
from downstream.classify.sweep import configure, main, parse_grid, summarize


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A recipe that trains from scratch for two epochs on two classes of eight images."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(8):
            pixels = rng.integers(0, 100, (40, 40, 3)) + 150 * label
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / name / f"{number}.png")
    pack(list_source(tmp_path / "images"), tmp_path / "shards")
    keys = {
        "name": "grid",
        "runs": str(tmp_path / "runs"),
        "model": {"arch": "vit_tiny", "position": "sincos"},
        "data": {"shards": str(tmp_path / "shards"), "image_size": 32, "num_workers": 0},
        "val": {"shards": str(tmp_path / "shards")},
        "head": {"num_classes": 2},
        "optim": {"warmup_epochs": 0},
        "train": {"epochs": 2, "global_batch_size": 8, "precision": "fp32", "ds_config": "zero0"},
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(keys))
    return str(path)


def test_grid_contains_every_combination(recipe: str):
    grid = parse_grid(["optim.base_lr=1e-4,5e-4", "optim.weight_decay=0.05,0.1,0.3"])
    assert len(grid) == 6
    configs = configure(recipe, [], grid)
    assert {(c.optim.base_lr, c.optim.weight_decay) for c in configs} == {
        (rate, decay) for rate in (1e-4, 5e-4) for decay in (0.05, 0.1, 0.3)
    }
    assert len({c.name for c in configs}) == 6
    assert {Path(c.runs).name for c in configs} == {"grid"}


@pytest.mark.parametrize("argument", ["optim.base_lr", "optim.base_lr=", "optim.base_lr=1,,2"])
def test_malformed_grid_is_rejected(argument: str):
    with pytest.raises(ValueError, match=r"write section\.key=value,value"):
        parse_grid([argument])


def test_invalid_setting_is_rejected_before_any_training(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        main([recipe, "--grid", "optim.base_lr=1e-4,-1"])
    assert ended.value.code == 1
    assert "optim.base_lr=-1" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_summary_has_best_mean_and_standard_deviation():
    scores = [0.5, 0.75, 0.7]
    summary = summarize([["a=1"], ["a=2"], ["a=3"]], scores)
    assert (summary["best"], summary["setting"], summary["runs"]) == (0.75, ["a=2"], 3)
    assert summary["mean"] == pytest.approx(np.mean(scores))
    assert summary["std"] == pytest.approx(statistics.stdev(scores))


@pytest.mark.engine
def test_real_grid_runs_and_a_failing_run_is_named(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    command = [recipe, "--launcher", sys.executable, "--grid", "optim.base_lr=1e-3,1e-9"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed
    summary = json.loads(printed.out.splitlines()[-1])
    assert summary["runs"] == 2
    assert 0 <= summary["mean"] <= summary["best"] <= 1
    rates = [
        yaml.safe_load((tmp_path / "runs/grid" / n / "config.yaml").read_text())["optim"]["base_lr"]
        for n in ("run000", "run001")
    ]
    assert rates == [1e-3, 1e-9]
    for shard in (tmp_path / "shards").glob("*.tar"):
        shard.unlink()
    with pytest.raises(SystemExit) as ended:
        main([*command, "name=other"])
    assert ended.value.code == 1
    assert "other/run000 failed" in capsys.readouterr().err
