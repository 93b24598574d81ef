"""A run whose shards have changed continues with them from the end of an epoch, if told to."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.rank_checks import assert_same_run

from pretrain.trainer.metrics import read_metrics

pytestmark = pytest.mark.engine


def test_added_shard_is_accepted_at_the_end_of_an_epoch(
    shards: Path, write_recipe: Callable[..., Path], start: Callable[..., Any], tmp_path: Path
) -> None:
    """60 samples make 7 steps per epoch, 80 samples make 10."""
    mine, names = tmp_path / "shards", sorted(path.name for path in shards.glob("*.tar"))
    mine.mkdir()
    for name in names[:2]:
        shutil.copy(shards / name, mine)
    keys = ["train.epochs=2", f"data.shards={mine}", "checkpoint.every_steps=7", "train.ds_config=zero1"]
    recipe = write_recipe(tmp_path)
    start(recipe, *keys, "checkpoint.keep_last=3").finish()
    for copy in ("within", "twice"):
        shutil.copytree(tmp_path / "runs/tiny", tmp_path / "runs" / copy, ignore=shutil.ignore_patterns("step_*14"))
    shutil.rmtree(tmp_path / "runs/tiny/checkpoints/step_00000014")
    (tmp_path / "runs/within/checkpoints/step_00000007").rename(tmp_path / "runs/within/checkpoints/step_00000008")
    manifest = tmp_path / "runs/within/checkpoints/step_00000008/manifest.json"
    content = json.loads(manifest.read_text())
    content["state"]["step"] = 8
    del content["crc32"]  # older manifests have none
    manifest.write_text(json.dumps(content))

    shutil.copy(shards / names[2], mine)
    (mine / "index.npz").unlink()
    rejected, accepts = "".join(start(recipe, *keys).outputs()), "data.accept_changed_shards=true"
    assert f"1 of 3 shards are new: '{names[2]}'; {accepts} accepts them" in rejected
    within = "".join(start(recipe, *keys, accepts, "name=within").outputs())
    assert "step 8, lies within the one from step 7 to step 14" in within

    output = start(recipe, *keys, accepts).finish()
    assert "resumes from step_00000007" in output
    assert "2 epochs, 17 steps" in output
    assert "since step 7, the end of epoch 1, on other shards" in output
    rows = read_metrics(tmp_path / "runs/tiny/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 18))
    assert [row["epoch"] for row in rows[7:]] == pytest.approx([1 + step / 10 for step in range(1, 11)])
    (change,) = json.loads((tmp_path / "runs/tiny/environment.json").read_text())["shard_changes"]
    assert (change["step"], change["after"]["samples"]) == (7, 80)

    start(recipe, *keys, accepts, "name=twice").finish()
    assert_same_run(tmp_path / "runs/tiny", tmp_path / "runs/twice")
