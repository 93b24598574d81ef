"""What the entries of detection and segmentation share; nothing of mmengine is needed to say that it is missing."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.trainer.launch import World, init_distributed
from pretrain.trainer.run_folder import RunFolder

if TYPE_CHECKING:
    from downstream.dense.mmengine.config_file import Job


def read_job(name: str, changes: list[str], configs: Path, spread: Callable[[Any], None]) -> "Job":
    """As `downstream.dense.mmengine.config_file.load`; ValueError as well where mmengine is not installed."""
    try:
        from downstream.dense.mmengine.config_file import load
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error}: `python -m downstream.doctor` says how to get what detection and segmentation need"
        ) from None
    return load(name, changes, configs, spread)


def train_job(job: "Job", world: World, check: Callable[[Any, list[str]], list[str]]) -> None:
    """The whole job, on all ranks; `check` as of `downstream.dense.mmengine.job.run`."""
    init_distributed(world)
    # This imports DeepSpeed, which looks for its accelerator at once.
    from downstream.dense.mmengine.job import run

    with RunFolder(Path(job.cfg.work_dir)).locked(world.is_main and not job.test):
        run(job, world, check)
