"""Trains a detector: `deepspeed downstream/detect/train_detector.py CONFIG start.checkpoint=FILE [KEY=value ...]`.

CONFIG is an mmengine configuration or the name of one in downstream/detect/configs. torchrun, srun and python work too.
A stopped training continues when the same command is run again; test=FILE evaluates a checkpoint instead.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a launcher starts this file as a script

from downstream.dense.entry import main
from downstream.detect.detector_keys import propagate_keys

CONFIGS = Path(__file__).parent / "configs"

if __name__ == "__main__":
    main(__doc__, CONFIGS, propagate_keys, checks="downstream.detect.coco_checks")
