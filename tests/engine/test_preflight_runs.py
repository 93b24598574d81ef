"""`python -m pretrain.preflight` on two ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import ROOT

pytestmark = pytest.mark.engine
PREFLIGHT = str(ROOT / "pretrain" / "preflight.py")


def test_all_ranks_of_a_sound_run_pass(start: Callable[..., Any], recipe: Path, tmp_path: Path):
    """Also those that the main rank, which has the store, might leave alone at the end."""
    output = start(recipe, script=PREFLIGHT).finish()
    assert "code, versions, recipe, shards, disk and GPUs are fine on all ranks" in output
    assert not (tmp_path / "runs").exists()
