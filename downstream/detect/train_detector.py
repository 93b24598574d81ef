"""Trains a detector: `deepspeed downstream/detect/train_detector.py CONFIG checkpoint=FILE [KEY=value ...]`, or by others.

CONFIG is an mmengine configuration or the name of one in downstream/detect/configs. A training that was stopped
continues when the same command is given again; with test=FILE a checkpoint is evaluated instead.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a launcher starts us as a script

from downstream.dense.entry import read_job, train_job
from downstream.detect.detector_keys import propagate_keys
from pretrain.trainer.launch import World
from pretrain.trainer.main import main

if TYPE_CHECKING:
    from downstream.dense.mmengine.config_file import Job

CONFIGS = Path(__file__).parent / "configs"


def read(name: str, changes: list[str]) -> "Job":
    return read_job(name, changes, CONFIGS, propagate_keys)


def train(job: "Job", world: World) -> None:
    train_job(job, world, _check)


def _check(cfg: Any, splits: list[str]) -> list[str]:
    from downstream.detect.coco_checks import check  # of mmdet, which is imported when the ranks have started

    return check(cfg, splits)


if __name__ == "__main__":
    main(__doc__, read, train, recipe="CONFIG")
