"""Trains a detector: `deepspeed downstream/detect/run.py CONFIG checkpoint=FILE [KEY=value ...]`, or by others.

CONFIG is an mmengine configuration or the name of one in downstream/detect/configs. A training that was stopped
continues when the same command is given again; with test=FILE a checkpoint is evaluated instead.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a launcher starts us as a script

from downstream.dense.command import Job, load
from downstream.detect.settings import spread_settings
from pretrain.command import main
from pretrain.launch import World, start
from pretrain.runfolder import RunFolder

CONFIGS = Path(__file__).parent / "configs"


def train(job: Job, world: World) -> None:
    """The whole job, on all ranks."""
    start(world)
    # These import DeepSpeed, which looks for its accelerator at once.
    from downstream.dense.train import run
    from downstream.detect.checks import check

    with RunFolder(Path(job.cfg.work_dir)).owned(world.is_main and not job.test, named_by="work_dir"):
        run(job, world, check)


if __name__ == "__main__":
    main(__doc__, lambda name, changes: load(name, changes, CONFIGS, spread_settings), train, recipe="CONFIG")
