"""The checkpoints of a run: taken at a step, written during the next ones, and resumed from the newest intact one.

`checkpoint_layout.py` defines their layout, `checkpoint_writer.py` writes them, and `retention.py` decides which are
kept.
"""

import logging
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain.trainer.attempt import node_name
from pretrain.trainer.checkpoint_layout import (
    EMA_FILE,
    LATEST,
    UNFINISHED,
    TrainState,
    checkpoint_name,
    checkpoint_names,
    damage,
    latest_checkpoint,
    read_state,
)
from pretrain.trainer.checkpoint_writer import CheckpointWriter
from pretrain.trainer.config import CheckpointConfig
from pretrain.trainer.deepspeed_files import SafeCheckpointEngine, TakingEngine
from pretrain.trainer.durable import make_folder, write_durably
from pretrain.trainer.elastic import BY_STAGE, has_other_parts, layout_change, load_parts
from pretrain.trainer.ema import NoEMA
from pretrain.trainer.host_copy import HostCopies
from pretrain.trainer.launch import World
from pretrain.trainer.optim import keep_fused
from pretrain.trainer.phases import UNLIMITED
from pretrain.trainer.shard_record import ChangedShards, has_other_samples, shard_difference

_CLIENT_KEY = "lomar"  # ours, inside DeepSpeed's own dictionary
# Keys that no longer exist, with the value that every run had that is still the same without them.
_REMOVED = {"optim.decay_class_token": True}
_log = logging.getLogger(__name__)


class CannotContinueError(ValueError):
    """The run, as it is configured now, cannot continue from its intact checkpoint."""


class Checkpoints:
    """The checkpoints of one run. Every method but `names` is called by all ranks together."""

    def __init__(self, folder: Path, world: World, config: CheckpointConfig):
        self.folder, self.world, self.config = folder, world, config
        self._damaged: set[str] = set()  # found when the run was resumed
        self._copies = HostCopies()
        self._group: dist.ProcessGroup | None = None  # of the threads that write
        make_folder(folder)

    def names(self) -> list[str]:
        """The names of the finished checkpoints, latest step first."""
        return checkpoint_names(self.folder)

    def begin(self, engine: Any, ema: NoEMA, state: TrainState) -> CheckpointWriter:
        """Takes a checkpoint and writes it while the training goes on; the previous one must have been written.

        Training waits until weights, optimizer and moving average are copied to host memory. If writing fails, the
        writer's `wait` returns the problem, and all older checkpoints are kept.
        """
        name = checkpoint_name(state.step)
        engine.checkpoint_engine = files = TakingEngine(engine._config, self._copies)
        engine._copy_recovery_script = lambda folder: None  # it would bypass our checkpoint engine
        self._connect_writers()
        engine.save_checkpoint(
            str(self.folder / UNFINISHED), tag=name, client_state={_CLIENT_KEY: asdict(state)}, save_latest=False
        )
        if self.world.is_main and ema.model is not None:
            files.save(dict(ema.model.state_dict()), EMA_FILE)
        self._copies.wait()
        # With its type, since a MemoryError has no text.
        failure = f"{type(files.failure).__name__}: {files.failure}" if files.failure else None
        return CheckpointWriter(
            self.folder,
            name,
            files.taken,
            deepcopy(state),
            failure,
            damaged=self._damaged,
            config=self.config,
            world=self.world,
            group=self._group,
            copies=self._copies,
        )

    def _connect_writers(self) -> None:
        """Makes the process group of the threads that write; later, the store that this needs may have died."""
        if self._group is None and self.world.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=UNLIMITED)

    def newest_intact(self) -> tuple[str, TrainState] | None:
        """The newest checkpoint whose files all match what was written; None if there are no checkpoints.

        Raises:
            ValueError: there are checkpoints, and all of them are damaged.
        """
        names = [self.names()]
        dist.broadcast_object_list(names)  # a shared disk may not look the same to all ranks
        for name in names[0]:
            checkpoint = self.folder / name
            mine = damage(checkpoint, part=self.world.rank, parts=self.world.size)
            problem = first_problem(mine and f"{mine} (found by rank {self.world.rank} on {node_name()})")
            if problem is None:
                return name, read_state(checkpoint)
            self._damaged.add(name)
            if self.world.is_main:
                _log.warning("checkpoint %s is damaged and skipped: %s", name, problem)
        if names[0]:
            raise ValueError(
                f"no intact checkpoint in {self.folder}: restore one, or move the folder away to start from step 0"
            )
        return None

    def resume(
        self, engine: Any, ema: NoEMA, fresh: TrainState, changed: ChangedShards | None = None
    ) -> tuple[TrainState, str | None]:
        """Loads the newest intact checkpoint into engine and moving average, whatever its ranks and ZeRO stage.

        Args:
            engine, ema: what to load into.
            fresh: the state of a new run.
            changed: accepts shards other than the checkpoint's; None refuses them.

        Returns:
            The state of the run and the checkpoint's name; `fresh` and None if there are no checkpoints.

        Raises:
            CannotContinueError: the newest checkpoint is from a different training, or other bits are refused.
            ValueError: all checkpoints are damaged, or other shards cannot be accepted at this step.
        """
        self._connect_writers()
        found = self.newest_intact()
        if found is None:
            return fresh, None
        name, state = found
        if changed and has_other_samples(state, fresh):
            state = changed.accept(state, fresh, self.names())
        check_continues(state, fresh)
        self._check_numerics(state, fresh)
        engine.checkpoint_engine = SafeCheckpointEngine(engine._config)
        if has_other_parts(engine, self.folder / name, state, fresh):
            load_parts(engine, self.folder / name)
        else:
            path, _ = engine.load_checkpoint(str(self.folder), tag=name)
            assert path is not None, f"DeepSpeed did not load {self.folder / name}"
        keep_fused(engine.basic_optimizer)
        ema.load(self.folder / name)
        if self.world.is_main and latest_checkpoint(self.folder) != self.folder / name:
            write_durably(self.folder / LATEST, name)  # the one it named may be damaged, and will be written again
        now = {key: getattr(fresh, key) for key in ("world_size", "zero_stage", "numerics", "machine", "shards")}
        return replace(state, **now), name

    def _check_numerics(self, state: TrainState, now: TrainState) -> None:
        """Refuses to continue with other bits than an uninterrupted run would have, or warns about it."""
        layout = layout_change(state, now)
        changed = _differences(*(_without_graphs(one.numerics) for one in (state, now)))
        chosen = [change for change in changed if state.zero_stage == now.zero_stage or not change.startswith(BY_STAGE)]
        if chosen and self.config.exact_resume:
            raise CannotContinueError(
                f"the run would not continue with the same bits: {', '.join(chosen)}; change these back "
                f"(model.compile, model.attention, model.residual, train.deterministic, the device), or set "
                f"checkpoint.exact_resume=false"
            )
        if (layout or changed) and self.world.is_main:
            _log.warning("the run continues with different bits: %s", ", ".join(layout + changed))
        elsewhere = _differences(state.machine, now.machine)
        if elsewhere and self.world.is_main:
            _log.warning("the run may continue with different bits: %s", ", ".join(elsewhere))


def first_problem(mine: str | None) -> str | None:
    """The problem of the first rank that has one; the same on all ranks."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, mine)
    return next((p for p in problems if p), None)


def check_continues(state: TrainState, now: TrainState) -> None:
    """Raises CannotContinueError, naming every difference, if a checkpoint is from a different training."""
    differences = _differences(state.resume_signature, now.resume_signature)
    if has_other_samples(state, now):
        differences.append(
            f"data.shards has different samples: {shard_difference(state.shards, now.shards)}; "
            "data.accept_changed_shards=true accepts them at the end of an epoch"
        )
    if differences:
        raise CannotContinueError(
            "the run's checkpoint is from a different training:\n  " + "\n  ".join(differences) + "\nchange these back"
        )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What changed. A key that is newer than the checkpoint counts only if it is set now."""
    before, after = _flatten(old), _flatten(new)
    return [
        f"{key} was {before.get(key, 'unset')!r} and is {after.get(key, 'unset')!r}"
        for key in sorted(before.keys() | after.keys())
        if (key in after or before[key] != _REMOVED.get(key))
        if (before[key] != after.get(key) if key in before else after[key])
    ]


def _without_graphs(numerics: dict[str, Any]) -> dict[str, Any]:
    """Drops `cuda_graphs`: a graph computes the same bits as its kernels launched one by one."""
    return {key: value for key, value in numerics.items() if key != "cuda_graphs"}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
