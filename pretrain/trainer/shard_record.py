"""What a checkpoint records of the shards that it was trained on, to say later what is different."""

from collections.abc import Iterator, Mapping

from data.index import Index
from data.names import shown

Record = Mapping[str, list[int]]  # by shard: its bytes and its samples
MAX_SHARDS = 100_000  # of more, a record would slow down every checkpoint


def record_shards(index: Index) -> dict[str, list[int]]:
    """Bytes and samples of each shard, by its name; nothing of more than `MAX_SHARDS` shards."""
    if len(index.shards) > MAX_SHARDS:
        return {}
    numbers = zip(index.shard_bytes.tolist(), index.shard_sizes.tolist(), strict=True)
    return {name: list(pair) for name, pair in zip(index.shards, numbers, strict=True)}


def shard_difference(before: Record, now: Record) -> str:
    """In words, for shards whose indexes have different fingerprints."""
    if not before or not now:  # too many, or the checkpoint is older than such records
        return "the fingerprint of the index differs"
    same_sizes = "shards of the same names and sizes have other images or labels in them"
    return "; ".join(_differences(before, now)) or same_sizes


def _differences(before: Record, now: Record) -> Iterator[str]:
    new, gone = [name for name in now if name not in before], [name for name in before if name not in now]
    if new:
        yield f"{len(new)} of {len(now)} shards are new: {shown(new)}"
    if gone:
        yield f"{len(gone)} of {len(before)} shards are gone: {shown(gone)}"
    changed = [name for name in now if name in before and list(before[name]) != list(now[name])]
    if changed:
        old, new_numbers = before[changed[0]], now[changed[0]]
        yield (
            f"{len(changed)} shards were written anew: {shown(changed)} (the first had {old[1]} samples in {old[0]} "
            f"bytes, and has {new_numbers[1]} in {new_numbers[0]})"
        )
