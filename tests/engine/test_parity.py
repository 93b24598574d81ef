"""DeepSpeed in every ZeRO stage, with and without accumulation, is plain torch: same losses, same gradient norms."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from steps import POISONED, SCRIPT, configure, plain_steps

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(("accumulation", "clip"), [(1, 0.0), (4, 0.0), (2, 0.1)])
@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_engine_equals_plain_torch(
    stage: str, accumulation: int, clip: float, recipe: Path, start: Callable[..., Any], tmp_path: Path
):
    overrides = [
        f"train.ds_config=ds_configs/{stage}.json",
        f"train.accumulation={accumulation}",
        f"optim.clip_grad={clip}",
    ]
    out = tmp_path / "steps.json"
    start(out, str(recipe), *overrides, script=SCRIPT).finish()
    result = json.loads(out.read_text())
    expected = plain_steps(configure(str(recipe), overrides))
    for step, ((loss, norm, applied), (plain_loss, plain_norm)) in enumerate(
        zip(result["steps"], expected, strict=True)
    ):
        assert loss == pytest.approx(plain_loss, rel=1e-5), step
        assert applied == (step != POISONED)
        if applied:
            assert norm == pytest.approx(plain_norm, rel=1e-4), step
        else:
            assert not math.isfinite(norm)
    effective = result["effective"]
    assert effective["zero_stage"] == int(stage[-1])
    assert effective["gradient_accumulation_steps"] == accumulation
    assert effective["gradient_clipping"] == clip, "DeepSpeed's own default is 1.0"
