"""What the commands that train a detector or a segmentor share.

mmengine and DeepSpeed are imported only when needed: a command must be able to report what is missing, and DeepSpeed
looks for its accelerator on import.
"""

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from downstream.dense.data_checks import needs_mm
from downstream.dense.job import Job
from pretrain.trainer import main as command_line
from pretrain.trainer.launch import World, init_distributed
from pretrain.trainer.logs import log_to_file
from pretrain.trainer.preflight import checked_start
from pretrain.trainer.run_folder import RunFolder


def main(description: str | None, configs: Path, propagate: Callable[[Any], None], checks: str) -> NoReturn:
    """Trains as configured, or evaluates a checkpoint, and ends the process.

    Args:
        description: of the command, for --help.
        configs: the folder of the shipped configurations.
        propagate: copies top-level keys of a configuration to where they are read.
        checks: a module with a function `check` for `downstream.dense.mmengine.runner.run`. It is imported after all
            ranks have started, because it needs mmdet or mmseg.
    """
    load = functools.partial(_load, configs=configs, propagate=propagate)
    command_line.main(description, load, functools.partial(_train, checks=checks), recipe="CONFIG")


def _load(name: str, overrides: list[str], configs: Path, propagate: Callable[[Any], None]) -> Job:
    """Like `load_job`, but raises ValueError if mmengine is not installed, too."""
    with needs_mm():
        from downstream.dense.mmengine.config_file import load_job
    return load_job(name, overrides, configs, propagate)


def _train(job: Job, world: World, checks: str) -> None:
    folder = RunFolder(Path(job.cfg.work_dir))
    # Configuration and data are not compared across ranks: they are the libraries' objects and files.
    checked_start(world, folder.root, "", lambda: None, lambda nothing: "")
    init_distributed(world)
    with needs_mm():
        from downstream.dense.mmengine.runner import run

        check = importlib.import_module(checks).check
    if not job.test:
        check_folder(folder)
    with folder.locked(world.is_main and not job.test):
        log_to_file(folder.logs, world)
        run(job, world, check)


def check_folder(folder: RunFolder) -> None:
    """Raises ValueError if the folder belongs to another kind of training, whose files would mix with ours."""
    if folder.config.is_file():
        raise ValueError(f"{folder.root} belongs to a pretraining run or a classifier: choose another name=")
