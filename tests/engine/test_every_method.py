"""Every method and pair on real engines: plain torch's losses in ZeRO-3, which parts most, and an exact resume."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from checks import assert_same_run, wait_for
from steps import POISONED, SCRIPT, configure, plain_steps

from pretrain.metrics import read_metrics

pytestmark = pytest.mark.engine

MAE = {"name": "mae", "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
LOMAR = {"name": "lomar", "windows": 2, "window": 3}
SINCOS = {"arch": "vit_tiny", "position": "sincos"}
RELATIVE = {"arch": "vit_tiny"}
PARTIAL = {"throw": 0.3, "kernel": 3}
CELLS = {"name": "simmim", "cell": 16}
BEIT = {"name": "beit", "tokenizer": {"name": "random_projection", "codes": 32}}

METHODS: dict[str, dict[str, Any]] = {
    "mae": {"method": MAE, "model": SINCOS},
    "mae-partial": {"method": MAE, "model": SINCOS, "partial": PARTIAL},
    "lc_mae": {"method": MAE | {"name": "lc_mae", "proj_dim": 16}, "model": SINCOS},
    "lc_mae-conv": {"method": MAE | {"name": "lc_mae", "decoder": "conv"}, "model": SINCOS},
    "ae": {"method": MAE | {"name": "ae", "block": 24}, "model": SINCOS},
    "simmim": {"method": CELLS, "model": SINCOS},
    "simmim-partial": {"method": CELLS, "model": RELATIVE, "partial": PARTIAL},
    "beit": {"method": BEIT, "model": RELATIVE},
    "lomar-beit": {"method": {**BEIT, "windows": 2, "window": 3}, "model": SINCOS},
    "lomar-partial": {"method": LOMAR, "model": RELATIVE, "partial": PARTIAL},
    "lomar-late": {"method": {**LOMAR, "join": 1}, "model": RELATIVE},
    "lomar-late-partial": {"method": {**LOMAR, "join": 1}, "model": RELATIVE, "partial": PARTIAL},
}


@pytest.fixture(params=METHODS)
def of_method(request: pytest.FixtureRequest, recipe: Path) -> Path:
    """The tiny recipe with another method."""
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | METHODS[request.param]))
    return recipe


def test_zero3_equals_plain_torch(of_method: Path, start: Callable[..., Any], tmp_path: Path):
    overrides = ["train.ds_config=ds_configs/zero3.json", "train.accumulation=2"]
    out = tmp_path / "steps.json"
    start(out, of_method, *overrides, script=SCRIPT).finish()
    results = json.loads(out.read_text())["steps"]
    expected = plain_steps(configure(str(of_method), overrides))
    for step, ((loss, norm, _), (plain_loss, plain_norm)) in enumerate(zip(results, expected, strict=True)):
        assert loss == pytest.approx(plain_loss, rel=1e-5), step
        if step != POISONED:
            assert norm == pytest.approx(plain_norm, rel=1e-4), step


@pytest.mark.parametrize("of_method", ["mae-partial", "lomar-late-partial"], indirect=True)
def test_ten_steps_equal_five_then_kill_then_five(of_method: Path, start: Callable[..., Any], tmp_path: Path):
    keys = ("train.ds_config=ds_configs/zero3.json", "train.precision=bf16")
    start(of_method, *keys, "name=whole").finish()
    broken = tmp_path / "runs" / "broken"
    killed = start(of_method, *keys, "name=broken")
    wait_for(broken / "checkpoints" / "step_00000005" / "manifest.json", killed)
    killed.kill()
    assert not (broken / "encoder.safetensors").exists(), "the run ended before it was killed"
    assert "continues from step_00000005" in start(of_method, *keys, "name=broken").finish()
    assert_same_run(tmp_path / "runs" / "whole", broken)


@pytest.mark.parametrize("of_method", ["lc_mae"], indirect=True)
def test_the_terms_of_a_loss_are_logged(of_method: Path, start: Callable[..., Any], tmp_path: Path):
    start(of_method).finish()
    for row in read_metrics(tmp_path / "runs" / "tiny" / "metrics.jsonl"):
        assert row["loss"] == pytest.approx(row["loss_mae"] + row["loss_cross"] + row["loss_in"], rel=1e-5)
