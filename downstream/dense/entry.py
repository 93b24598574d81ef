"""What the entries of detection and segmentation share; nothing of mmengine is needed to say that it is missing."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.launch import World, start
from pretrain.runfolder import RunFolder

if TYPE_CHECKING:
    from downstream.dense.command import Job


def read_job(name: str, changes: list[str], configs: Path, spread: Callable[[Any], None]) -> "Job":
    """As `downstream.dense.command.load`; ValueError as well where mmengine is not installed."""
    try:
        from downstream.dense.command import load
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error}: `python -m downstream.doctor` says how to get what detection and segmentation need"
        ) from None
    return load(name, changes, configs, spread)


def train_job(job: "Job", world: World, check: Callable[[Any, list[str]], list[str]]) -> None:
    """The whole job, on all ranks; `check` as of `downstream.dense.train.run`."""
    start(world)
    # This imports DeepSpeed, which looks for its accelerator at once.
    from downstream.dense.train import run

    with RunFolder(Path(job.cfg.work_dir)).owned(world.is_main and not job.test, named_by="work_dir"):
        run(job, world, check)
