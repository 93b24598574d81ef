"""A short fault injection campaign: benchmarks/faults.py --quick."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults import Campaign, run_cases
from benchmarks.faults_cases import CASES, QUICK
from benchmarks.faults_scene import differences

pytestmark = pytest.mark.engine


def test_nothing_hangs_and_nothing_is_lost(start: Callable[..., Any], tmp_path: Path):
    campaign = Campaign(start, tmp_path)
    figures = run_cases(campaign, QUICK)
    assert figures["injected"] == len(QUICK) == figures["exact"] + figures["stopped_with_cause"], figures
    stopped = [case.stops for case in QUICK]
    assert figures["stopped_with_cause"] == sum(stopped)
    whole = sorted((tmp_path / "runs").glob("whole-*"))
    assert differences(whole[0], whole[0]) == ""
    assert differences(whole[0], whole[1]), "two other trainings differ"


def test_campaign_covers_both_kinds_of_training_in_all_stages():
    assert len(CASES) >= 100
    assert len({str(case) for case in CASES}) == len(CASES)
    places = {(case.training, case.stage) for case in CASES}
    assert places == {(training, stage) for training in ("pretrain", "finetune") for stage in range(4)}
