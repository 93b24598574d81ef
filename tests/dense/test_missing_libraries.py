"""Commands where mmcv and what needs it are not installed: one line, which says what to do."""

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


def test_commands_say_what_is_missing():
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
