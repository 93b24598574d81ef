"""What a checkpoint records about its training shards, to report later what has changed, or to accept it."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data.index import Index
from data.names import shown
from pretrain.trainer.checkpoint_layout import TrainState, checkpoint_step

Record = Mapping[str, list[int]]  # by shard: bytes, samples and, if the index has their checksums, a CRC-32 of these
MAX_SHARDS = 100_000  # a record of more would slow down every checkpoint


def record_shards(index: Index) -> dict[str, list[int]]:
    """A `Record`; empty for more than `MAX_SHARDS` shards."""
    if len(index.shards) > MAX_SHARDS:
        return {}
    columns = [index.shard_bytes.tolist(), index.shard_sizes.tolist()]
    if index.checksum is not None:
        parts = np.split(index.checksum, index.shard_ends[:-1])
        columns.append([zlib.crc32(part.astype("<u4").tobytes()) for part in parts])
    return {name: list(numbers) for name, *numbers in zip(index.shards, *columns, strict=True)}


def has_other_samples(before: TrainState, now: TrainState) -> bool:
    """Whether the shards differ: names, sizes, samples, labels and, if both records have checksums, images."""
    return before.fingerprint != now.fingerprint or bool(_with_other_images(before.shards, now.shards))


def shard_difference(before: Record, now: Record) -> str:
    """What has changed, in words, for shards with other samples."""
    if not before or not now:  # too many, or the checkpoint is older than such records
        return "the fingerprint of the index differs"
    same_sizes = "shards with the same names and sizes contain different images or labels"
    named = shown(_with_other_images(before, now))
    return "; ".join(_differences(before, now)) or same_sizes + (f": {named}" if named else "")


@dataclass(frozen=True)
class ChangedShards:
    """Accepts other shards where a pass over the old ones ends: `data.accept_changed_shards`.

    From there on, the run is where a run with the new shards from the start would be after the same number of epochs:
    its order, steps per epoch, learning rate and length are those of that run. `TrainState.offset` is the difference
    between the steps of the two.

    Attributes:
        batch: `train.global_batch_size`.
        repeats: `data.repeats`, the epochs of a pass.
    """

    batch: int
    repeats: int = 1

    def accept(self, state: TrainState, now: TrainState, checkpoints: Sequence[str] = ()) -> TrainState:
        """The state that continues with the shards of `now`.

        Args:
            state: of the checkpoint.
            now: of a new run with the current shards.
            checkpoints: the names of all of the run's checkpoints.

        Raises:
            ValueError: the checkpoint is not where a pass ends; says which one is, or where that will be.
        """
        before = state.index_samples or sum(numbers[1] for numbers in state.shards.values())
        if not before:
            raise ValueError(
                "data.accept_changed_shards=true: the checkpoint does not record how many samples the shards had, so "
                "the end of an epoch is unknown: use the old shards, and set it back to false"
            )
        per_pass, per_epoch = before // self.batch * self.repeats, before // self.batch
        position = state.step + state.offset
        passes, within = divmod(position, per_pass)
        if within:
            raise ValueError(self._not_here(state, per_pass, checkpoints))
        epoch = passes * self.repeats
        offset = epoch * (now.index_samples // self.batch) - state.step
        change = {
            "step": state.step,
            "epoch": epoch,
            "what": shard_difference(state.shards, now.shards),
            "before": {"fingerprint": state.fingerprint, "samples": before, "steps_per_epoch": per_epoch},
            "after": {
                "fingerprint": now.fingerprint,
                "samples": now.index_samples,
                "steps_per_epoch": now.index_samples // self.batch,
            },
        }
        return replace(
            state,
            fingerprint=now.fingerprint,
            shards=now.shards,
            index_samples=now.index_samples,
            offset=offset,
            shard_changes=[*state.shard_changes, change],
        )

    def _not_here(self, state: TrainState, per_pass: int, checkpoints: Sequence[str]) -> str:
        start = (state.step + state.offset) // per_pass * per_pass - state.offset
        end, unit = start + per_pass, "an epoch" if self.repeats == 1 else f"a pass of {self.repeats} epochs"
        message = (
            f"data.accept_changed_shards=true accepts other shards only at the end of {unit}, but the newest "
            f"checkpoint, step {state.step}, lies within the one from step {start} to step {end}: train up to step "
            f"{end} with the old shards (checkpoint.every_steps={per_pass} saves there)"
        )
        at_an_end = [name for name in checkpoints if (checkpoint_step(name) or 0) == start and start]
        later = [name for name in checkpoints if (checkpoint_step(name) or 0) > start]
        if at_an_end:
            message += f", or move {shown(later)} away to continue from {shown(at_an_end)}"
        return message


def describe_change(change: Mapping[str, Any]) -> str:
    """One of `TrainState.shard_changes`, in words."""
    before, after = change["before"], change["after"]
    return (
        f"since step {change['step']}, the end of epoch {change['epoch']}, on other shards: {change['what']}; "
        f"{before['samples']} samples in {before['steps_per_epoch']} steps per epoch before, {after['samples']} in "
        f"{after['steps_per_epoch']} since"
    )


def _with_other_images(before: Record, now: Record) -> list[str]:
    """Shards of the same bytes and samples whose checksums are known and differ."""
    both = [(name, before[name], now[name]) for name in now if name in before]
    return [name for name, old, new in both if old[:2] == new[:2] and len(old) == len(new) == 3 and old != new]


def _differences(before: Record, now: Record) -> Iterator[str]:
    new, gone = [name for name in now if name not in before], [name for name in before if name not in now]
    if new:
        yield f"{len(new)} of {len(now)} shards are new: {shown(new)}"
    if gone:
        yield f"{len(gone)} of {len(before)} shards are gone: {shown(gone)}"
    changed = [name for name in now if name in before and list(before[name][:2]) != list(now[name][:2])]
    if changed:
        old, new_numbers = before[changed[0]], now[changed[0]]
        yield (
            f"{len(changed)} shards were rewritten: {shown(changed)} (the first had {old[1]} samples in {old[0]} "
            f"bytes, and now has {new_numbers[1]} in {new_numbers[0]})"
        )
