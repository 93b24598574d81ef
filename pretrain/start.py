"""Checks early what a run begins with: its images, and what `start` names, which `run.py` loads."""

import logging
from pathlib import Path

import torch.distributed as dist

from data.index import Index, load_index
from pretrain.config import PretrainConfig
from pretrain.trainer.checkpoint_layout import checkpoint_names
from pretrain.trainer.launch import World
from pretrain.trainer.phases import report_if_slow
from pretrain.trainer.run_folder import RunFolder

_log = logging.getLogger(__name__)


def find_start(config: PretrainConfig, folder: RunFolder, world: World) -> Path | None:
    """What a new run is loaded from: the file or folder, or the newest intact checkpoint of `start.run`.

    All ranks of a process group call it together.

    Returns:
        The path; None without a start, or if the run has a checkpoint of its own, from which it continues: by then the
        start may be gone.

    Raises:
        ValueError: all checkpoints of `start.run` are damaged.
    """
    start = config.start
    if start is None or not (start.checkpoint or start.run):
        return None
    is_new = [not checkpoint_names(folder.checkpoints)]
    dist.broadcast_object_list(is_new)  # a shared disk may not look the same to all ranks
    if not is_new[0]:
        if world.is_main:
            _log.info("%s already has checkpoints: the start is not loaded again", folder.root)
        return None
    if start.run:
        return _newest_checkpoint(start.run, config, world)
    assert start.checkpoint
    return Path(start.checkpoint)


def load_data(config: PretrainConfig, folder: RunFolder) -> Index:
    """The index of the training images; checks the start first, since indexing many shards takes long.

    Raises:
        ValueError: as `check_start` and `load_index`.
    """
    check_start(config, folder)
    with report_if_slow(f"reading or building the index of {config.data.shards}"):
        return load_index(config.data.shards, config.data.cache)


def check_start(config: PretrainConfig, folder: RunFolder) -> None:
    """Checks the start early, before the shards are indexed.

    Raises:
        ValueError: `start.checkpoint` does not exist, or `start.run` is no run or has no checkpoint.
    """
    start = config.start
    if start is None or checkpoint_names(folder.checkpoints):
        return
    if start.checkpoint and not Path(start.checkpoint).exists():
        raise ValueError(f"start.checkpoint={start.checkpoint}: no such file or folder")
    if start.run:
        source = RunFolder(Path(start.run))
        if not source.config.is_file():
            raise ValueError(
                f"start.run={start.run} is not the folder of a run: it has no {source.config.name}; for a file, or one "
                f"checkpoint of a run, set start.checkpoint"
            )
        if not checkpoint_names(source.checkpoints):
            raise ValueError(
                f"start.run={start.run} has no checkpoint yet: let it run until it saves one (checkpoint.every_steps), "
                f"or start from an encoder alone with start.checkpoint"
            )


def _newest_checkpoint(run: str, config: PretrainConfig, world: World) -> Path:
    from pretrain.trainer.checkpoint import Checkpoints  # imports DeepSpeed, which chooses its accelerator on import

    checkpoints = RunFolder(Path(run)).checkpoints
    try:
        found = Checkpoints(checkpoints, world, config.checkpoint).newest_intact()
    except ValueError:
        raise ValueError(
            f"start.run={run}: all of its checkpoints are damaged; start from another run, or from the encoder alone "
            f"with start.checkpoint={RunFolder(Path(run)).encoder}"
        ) from None
    assert found, "`check_start` has seen one"
    return checkpoints / found[0]
