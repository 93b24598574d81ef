"""A short soak test: benchmarks/soak.py with ranks started by the tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import soak

pytestmark = pytest.mark.engine


def test_repeatedly_killed_run_equals_an_uninterrupted_one(start: Callable[..., Any], tmp_path: Path) -> None:
    shards = soak.make_shards(tmp_path)
    recipe = soak.write_recipe(tmp_path, str(shards), kills=2)
    figures = soak.soak(start, recipe, tmp_path / "runs", [str(shards)], kills=2, seed=0)
    assert figures["kills"] >= 2
    assert figures["resumed"] >= 2
    assert figures["samples_identical"]
    assert figures["losses_identical"]
    assert figures["weights_identical"]
    rows = (tmp_path / "runs" / "whole" / "samples.jsonl").read_text().splitlines()
    rows[0] = rows[0].replace('"step": 1', '"step": 0')
    (tmp_path / "runs" / "whole" / "samples.jsonl").write_text("\n".join(rows))
    assert not soak.compare(tmp_path / "runs" / "whole", tmp_path / "runs" / "soaked")["samples_identical"]
