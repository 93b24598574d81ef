"""The checkpoints of a run: taken at a step, written beside the next ones, and resumed from the newest intact one.

Their layout is in `checkpoint_layout.py`, how they are written in `checkpoint_writer.py`, which of them stay in
`retention.py`.
"""

import logging
from copy import deepcopy
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

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
from pretrain.trainer.shard_record import ChangedShards, has_other_samples, shard_difference

_CLIENT_KEY = "lomar"  # ours, inside DeepSpeed's own dictionary
_log = logging.getLogger(__name__)


class CannotContinueError(ValueError):
    """An intact checkpoint is not one that the run, as it is configured now, can continue from."""


class Checkpoints:
    """The checkpoints of one run. Every method but `names` is called by all ranks together."""

    def __init__(self, folder: Path, world: World, config: CheckpointConfig):
        self.folder, self.world, self.config = folder, world, config
        self._damaged: set[str] = set()  # those that the run has resumed before
        self._copies = HostCopies()
        self._group: dist.ProcessGroup | None = None  # of the threads that write
        make_folder(folder)

    def names(self) -> list[str]:
        """The finished checkpoints, those of later steps first."""
        return checkpoint_names(self.folder)

    def begin(self, engine: Any, ema: NoEMA, state: TrainState) -> CheckpointWriter:
        """Takes a checkpoint, and writes it while the training goes on; the one before must be written.

        Training waits for a copy of weights, optimizer and moving average in host memory. What cannot be written is the
        problem that the writer tells in the end; it then has kept all older ones.
        """
        name = checkpoint_name(state.step)
        engine.checkpoint_engine = files = TakingEngine(engine._config, self._copies)
        engine._copy_recovery_script = lambda folder: None  # it would write beside our engine
        if self._group is None and self.world.size > 1:
            # Without a limit of time: the watchdog has one for a checkpoint that is waited for.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        engine.save_checkpoint(
            str(self.folder / UNFINISHED), tag=name, client_state={_CLIENT_KEY: asdict(state)}, save_latest=False
        )
        if self.world.is_main and ema.model is not None:
            files.save(dict(ema.model.state_dict()), EMA_FILE)
        self._copies.wait()
        damaged, self._damaged = self._damaged, set()
        return CheckpointWriter(
            self.folder,
            name,
            files.taken,
            deepcopy(state),
            str(files.failure) if files.failure else None,
            damaged=damaged,
            config=self.config,
            world=self.world,
            group=self._group,
            copies=self._copies,
        )

    def save(self, engine: Any, ema: NoEMA, state: TrainState) -> str | None:
        """As `begin`, and waits; returns the problem in words if it could not be written."""
        return self.begin(engine, ema, state).wait()

    def newest_intact(self) -> tuple[str, TrainState] | None:
        """The newest checkpoint whose files are all as they were written; None if there are no checkpoints.

        Raises:
            ValueError: there are checkpoints, and all of them are damaged.
        """
        names = [self.names()]
        dist.broadcast_object_list(names)  # a shared disk may not show all ranks the same
        for name in names[0]:
            checkpoint = self.folder / name
            problem = first_problem(damage(checkpoint, part=self.world.rank, parts=self.world.size))
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
        """Loads the newest intact checkpoint into engine and moving average, whatever ranks and stage it is of.

        Args:
            engine, ema: what is loaded into.
            fresh: the state of a new run.
            changed: accepts other shards than the checkpoint's, if they may be others.

        Returns:
            The state of the run and the checkpoint's name; `fresh` and None if there are no checkpoints.

        Raises:
            CannotContinueError: the newest checkpoint is of a different training.
            ValueError: all checkpoints are damaged, or other shards cannot be accepted at this step.
        """
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
            write_durably(self.folder / LATEST, name)  # what it named may be damaged, and will be written again
        now = {key: getattr(fresh, key) for key in ("world_size", "zero_stage", "numerics", "machine", "shards")}
        return replace(state, **now), name

    def _check_numerics(self, state: TrainState, now: TrainState) -> None:
        """Refuses, or says, that the run would continue with other bits than it would have had."""
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
            _log.warning("the run continues with other bits: %s", ", ".join(layout + changed))
        elsewhere = _differences(state.machine, now.machine)
        if elsewhere and self.world.is_main:
            _log.warning("the run may continue with other bits: %s", ", ".join(elsewhere))


def first_problem(mine: str | None) -> str | None:
    """The problem of the first rank that has one; the same on all ranks."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, mine)
    return next((p for p in problems if p), None)


def check_continues(state: TrainState, now: TrainState) -> None:
    """Raises CannotContinueError, naming every difference, where a checkpoint is of a different training."""
    differences = _differences(state.resume_signature, now.resume_signature)
    if has_other_samples(state, now):
        differences.append(
            f"data.shards has different samples: {shard_difference(state.shards, now.shards)}; "
            "data.accept_changed_shards=true continues with them, where an epoch ends"
        )
    if differences:
        raise CannotContinueError(
            "the run's checkpoint is of a different training:\n  " + "\n  ".join(differences) + "\nchange these back"
        )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What changed. A key that is younger than the checkpoint counts if it is set to something now."""
    before, after = _flatten(old), _flatten(new)
    return [
        f"{key} was {before.get(key, 'unset')!r} and is {after.get(key, 'unset')!r}"
        for key in sorted(before.keys() | after.keys())
        if (before[key] != after.get(key) if key in before else after[key])
    ]


def _without_graphs(numerics: dict[str, Any]) -> dict[str, Any]:
    """A CUDA graph computes the bits that its kernels compute when they are started one by one."""
    return {key: value for key, value in numerics.items() if key != "cuda_graphs"}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
