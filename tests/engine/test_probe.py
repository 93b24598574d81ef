"""Probing leaves a run bitwise identical, and reports the numbers of the encoder that the run saves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import probed_runs
from helpers.processes import SMALL
from helpers.rank_checks import assert_same_run
from PIL import Image
from safetensors.torch import load_file

from data.eval_loader import EvalLoader
from data.image_folder import load_samples
from pretrain.models.vit import ViT
from pretrain.probe.measure import names_of, probe
from pretrain.probe.settings import ProbeSettings
from pretrain.trainer.metrics import read_metrics

pytestmark = pytest.mark.engine
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def labeled_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of three classes, each with its own color: 21 to train on, and 11 to classify, one of them unreadable."""
    root = tmp_path_factory.mktemp("labeled")
    rng = np.random.default_rng(0)
    for number in range(32):
        path = root / ("train" if number < 21 else "val") / f"class{number % 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (70, 90, 3)) // 2 + 127 * (np.arange(3) == number % 3)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:100])
    return root


def engine_keys(stage: int) -> dict[str, Any]:
    """Partitions everything in stage 3, where by default a model as small as this one would stay gathered."""
    small = ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance")
    return {"zero_optimization": {"stage": stage, **(dict.fromkeys(small, 0) if stage == 3 else {})}}


@pytest.mark.parametrize("stage", [0, 3])
def test_probing_does_not_change_the_run(
    stage: int,
    write_recipe: Callable[..., Path],
    start: Callable[..., Any],
    tmp_path: Path,
    labeled_photos: Path,
):
    (tmp_path / "engine.json").write_text(json.dumps(engine_keys(stage)))
    settings = {"k": 5, "block": [1, 2], "attentive_steps": 20, "finetune_epochs": 2, "max_images": 15}
    section = {
        "train": str(labeled_photos / "train"),
        "val": str(labeled_photos / "val"),
        "every_epochs": 1,
        **settings,
    }
    common = [
        f"train.ds_config={tmp_path / 'engine.json'}",
        "train.global_batch_size=16",
        "train.epochs=2",
        "data.num_workers=1",
    ]
    plain, probed = write_recipe(tmp_path, "plain"), write_recipe(tmp_path, "probed", probe=section)
    jobs = [[str(recipe), *common] for recipe in (plain, probed, probed)]  # the last one finds everything done
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    start(tmp_path / "jobs.json", script=probed_runs.__file__).finish()

    runs = tmp_path / "runs"
    assert_same_run(runs / "plain", runs / "probed")
    assert not (runs / "plain" / "evaluation.jsonl").exists()
    rows = read_metrics(runs / "probed" / "evaluation.jsonl")
    assert [(row["step"], row["epoch"]) for row in rows] == [(5, 1), (10, 2)]

    with SMALL:
        encoder = ViT("vit_tiny", 16, (4, 5)).eval()
    encoder.load_state_dict(load_file(runs / "probed" / "encoder.safetensors"))
    sets = [EvalLoader(load_samples(labeled_photos / name), size=(64, 80), batch=8) for name in ("train", "val")]
    settings = ProbeSettings(**settings)
    expected = probe(encoder, *sets, settings, device=CPU)
    names = names_of(settings)
    assert {name: rows[-1][name] for name in (*names, "judge_by", "judge_reason")} == pytest.approx(expected)
    assert (rows[-1]["finetune_steps"], rows[-1]["judge_by"]) == (2, "none")
    assert 1 / 3 < expected["linear_top1"] < 1
