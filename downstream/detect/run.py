"""Trains a detector: `deepspeed downstream/detect/run.py CONFIG checkpoint=FILE [KEY=value ...]`, or by others.

CONFIG is an mmengine configuration or the name of one in downstream/detect/configs. A training that was stopped
continues when the same command is given again; with test=FILE a checkpoint is evaluated instead.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a launcher starts us as a script

from pretrain.command import main
from pretrain.launch import World, start
from pretrain.runfolder import RunFolder

if TYPE_CHECKING:
    from downstream.dense.command import Job

CONFIGS = Path(__file__).parent / "configs"


def read(name: str, changes: list[str]) -> "Job":
    """As `downstream.dense.command.load`; ValueError as well where mmengine is not installed."""
    try:
        from downstream.dense.command import load
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: `python -m downstream.doctor` says how to get what detection needs") from None
    from downstream.detect.settings import spread_settings

    return load(name, changes, CONFIGS, spread_settings)


def train(job: "Job", world: World) -> None:
    """The whole job, on all ranks."""
    start(world)
    # These import DeepSpeed, which looks for its accelerator at once.
    from downstream.dense.train import run
    from downstream.detect.checks import check

    with RunFolder(Path(job.cfg.work_dir)).owned(world.is_main and not job.test, named_by="work_dir"):
        run(job, world, check)


if __name__ == "__main__":
    main(__doc__, read, train, recipe="CONFIG")
