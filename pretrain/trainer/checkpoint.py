"""Atomic checkpoints: written to a temporary folder, checksummed, then renamed.

A run resumes from the newest intact one. Their layout is in `checkpoint_layout.py`.
"""

import json
import logging
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from pretrain.trainer.checkpoint_layout import (
    LATEST,
    MANIFEST,
    UNFINISHED,
    TrainState,
    checkpoint_name,
    checkpoint_names,
    checkpoint_step,
    has_all_bytes,
    load_deepspeed_file,
    read_files,
    read_state,
    size_and_crc,
)
from pretrain.trainer.config import CheckpointConfig
from pretrain.trainer.elastic import BY_STAGE, has_other_parts, layout_change, load_parts
from pretrain.trainer.ema import NoEMA
from pretrain.trainer.launch import World
from pretrain.trainer.optim import keep_fused
from pretrain.trainer.shard_record import ChangedShards, shard_difference

_CLIENT_KEY = "lomar"  # ours, inside DeepSpeed's own dictionary
_log = logging.getLogger(__name__)


class SafeCheckpointEngine(TorchCheckpointEngine):
    """Writes and reads DeepSpeed's files.

    A failed write must not raise on this rank while the others wait in DeepSpeed's barriers: it is kept in `failure`,
    for `Checkpoints.save` to agree on. Nothing but tensors, plain values and `deepspeed_types` is unpickled.
    """

    failure: Exception | None = None

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        try:
            super().save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            self.failure = error

    def load(self, path: str, map_location: Any = None) -> Any:
        return load_deepspeed_file(path, map_location)


class CannotContinueError(ValueError):
    """An intact checkpoint is not one that the run, as it is configured now, can continue from."""


class Checkpoints:
    """The checkpoints of one run. Every method but `names` is called by all ranks together."""

    def __init__(self, folder: Path, world: World, config: CheckpointConfig):
        self.folder, self.world, self.config = folder, world, config
        self._damaged: set[str] = set()  # those that the run has resumed before
        folder.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        """The finished checkpoints, those of later steps first."""
        return checkpoint_names(self.folder)

    def save(self, engine: Any, ema: NoEMA, state: TrainState) -> str | None:
        """Writes a checkpoint; returns the problem in words if that failed, and then keeps all older ones."""
        name = checkpoint_name(state.step)
        temporary = self.folder / UNFINISHED
        engine.checkpoint_engine = files = SafeCheckpointEngine(engine._config)
        engine._copy_recovery_script = lambda folder: None  # on a full disk it would raise on one rank only
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        dist.barrier()
        engine.save_checkpoint(str(temporary), tag=name, client_state={_CLIENT_KEY: asdict(state)}, save_latest=False)
        if self.world.is_main and files.failure is None:
            try:
                ema.save(temporary / name)
            except OSError as error:
                files.failure = error
        problem = first_problem(str(files.failure) if files.failure else None)
        if problem is None:
            problem = self._publish(temporary / name, state)
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        return problem and f"checkpoint {name} could not be written to {self.folder}: {problem}"

    def _publish(self, written: Path, state: TrainState) -> str | None:
        files = _gather({p.name: size_and_crc(p) for p in self._share(written)})
        problem = None
        if self.world.is_main:
            try:
                write_durably(written / MANIFEST, json.dumps({"state": asdict(state), "files": files}, indent=1))
                final = self.folder / written.name
                if final.exists():  # this step was saved before the run fell back to an older one
                    shutil.rmtree(final)
                os.replace(written, final)
                write_durably(self.folder / LATEST, final.name)
                self._delete_old(final.name)
            except OSError as error:
                problem = str(error)
        return first_problem(problem)

    def _delete_old(self, written: str) -> None:
        """Keeps the one just written, the newest before it, and those that are kept for good.

        One that is damaged does not count. Those of later steps, which the run has resumed before since they are
        damaged, go now: the run will train these steps again.
        """
        names, keep_every = self.names(), self.config.keep_every_steps
        later, earlier = names[: names.index(written)], names[names.index(written) + 1 :]
        whole = [name for name in earlier if has_all_bytes(self.folder / name)]
        kept = set(whole[: self.config.keep_last - 1])
        kept |= {name for name in earlier if keep_every and (checkpoint_step(name) or 0) % keep_every == 0}
        for name in [*self._damaged.intersection(later), *earlier]:
            if name not in kept:
                shutil.rmtree(self.folder / name)
        self._damaged.clear()

    def newest_intact(self) -> tuple[str, TrainState] | None:
        """The newest checkpoint whose files are all as they were written; None if there are no checkpoints.

        Raises:
            ValueError: there are checkpoints, and all of them are damaged.
        """
        names = self.names()
        for name in names:
            problem = first_problem(self._damage(self.folder / name))
            if problem is None:
                return name, read_state(self.folder / name)
            self._damaged.add(name)
            if self.world.is_main:
                _log.warning("checkpoint %s is damaged and skipped: %s", name, problem)
        if names:
            raise ValueError(
                f"no intact checkpoint in {self.folder}: restore one, or move the folder away to start from step 0"
            )
        return None

    def _damage(self, checkpoint: Path) -> str | None:
        files = read_files(checkpoint)
        if files is None:
            return f"{MANIFEST} is missing or unreadable"
        for name in sorted(files)[self.world.rank :: self.world.size]:
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if size_and_crc(path) != files[name]:
                return f"{name} differs from what was written"
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
        if changed and state.fingerprint != fresh.fingerprint:
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
        if self.world.is_main:
            write_durably(self.folder / LATEST, name)  # what it named may be damaged, and will be written again
        now = {key: getattr(fresh, key) for key in ("world_size", "zero_stage", "numerics", "machine")}
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

    def _share(self, folder: Path) -> list[Path]:
        return sorted(folder.iterdir())[self.world.rank :: self.world.size]


def first_problem(mine: str | None) -> str | None:
    """The problem of the first rank that has one; the same on all ranks."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, mine)
    return next((p for p in problems if p), None)


def check_continues(state: TrainState, now: TrainState) -> None:
    """Raises CannotContinueError, naming every difference, where a checkpoint is of a different training."""
    differences = _differences(state.resume_signature, now.resume_signature)
    if state.fingerprint != now.fingerprint:
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


def _gather(mine: dict[str, Any]) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def write_durably(path: Path, text: str) -> None:
    """Replaces a file atomically: a reader, or a crash, finds the old content or the new."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
