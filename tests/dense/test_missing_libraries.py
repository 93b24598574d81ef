"""Tests that commands without mmcv and its dependents print one line that explains what to do."""

import subprocess
import sys

from helpers.dense_runs import ROOT
from helpers.waiting import SECONDS

COMMANDS = {
    "downstream.detect.draw_detections": ["vitdet_tiny_pennfudan", "weights.pth", "images", "drawn"],
    "downstream.segment.draw_segments": ["upernet_tiny_camvid", "weights.pth", "images", "drawn"],
    "downstream.segment.check_masks": ["upernet_tiny_camvid", "data_root=nowhere"],
}
WITHOUT = """
import importlib, sys
sys.modules.update(dict.fromkeys(("mmcv", "mmdet", "mmseg", "mmengine")))
sys.exit(sum(importlib.import_module(name).main(arguments) for name, arguments in {commands}.items()))
"""


def test_each_command_points_to_the_doctor_in_one_line():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(commands=COMMANDS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    lines = done.stderr.splitlines()
    assert done.returncode == len(lines) == len(COMMANDS), done.stderr
    assert all(line.startswith("error: ") and "python -m downstream.doctor" in line for line in lines)
