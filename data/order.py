"""The crops of a step: a pure function of (seed, step, global batch, repeats, group size). No I/O, no state."""

from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from data.messages import counted

PART = 1 << 24  # samples whose order is in memory at once: 24 bytes each during sorting and 4 afterwards
_CHUNK = 1 << 20  # words drawn at once


class Stream(IntEnum):
    """Separate random streams of a sample: one more draw from one of them does not change the others."""

    CROP = 0
    MASK = 1
    SECOND_CROP = 2
    SHARDS = 3  # of an epoch: the order of its shards
    GROUP = 4  # of a group of shards: the order of its samples


class Views(NamedTuple):
    """What is shown: samples, and for each the epoch whose draws (crop, flip, colors, masks) it gets."""

    epochs: np.ndarray  # int64 (B,)
    samples: np.ndarray  # int64 (B,)


class _OrderInParts:
    """An order of samples, with one part in memory at a time.

    Attributes:
        ends: int64 (P,), the number of samples up to the end of each part.
    """

    def __init__(self, ends: np.ndarray) -> None:
        self.ends = ends
        self._number, self._part = -1, np.empty(0, np.int64)

    def samples(self, start: int, stop: int) -> np.ndarray:
        """Returns the samples at positions `start` up to `stop`, int64 (stop - start,); cheapest in ascending order."""
        assert 0 <= start < stop <= int(self.ends[-1])
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right").tolist()
        pieces = []
        for number in range(first, last + 1):
            if number != self._number:
                self._part = np.empty(0, np.int64)  # the old part's memory, before the new one needs its own
                self._number, self._part = number, self._make_part(number)
            begin = int(self.ends[number]) - len(self._part)
            pieces.append(self._part[max(start - begin, 0) : stop - begin])
        return np.concatenate(pieces).astype(np.int64, copy=False)

    def _make_part(self, number: int) -> np.ndarray:
        raise NotImplementedError


class EpochOrder(_OrderInParts):
    """A uniform shuffle of all samples: they are sorted by one raw 64-bit word each.

    NumPy guarantees the stream of a bit generator, but not that of its distributions, such as ``permutation``.

    Only one part is in memory at a time: the samples whose words begin with the same bits, which are consecutive in the
    order. Each part draws all words again, and the order is the same for every part size.
    """

    def __init__(self, num_samples: int, seed: int, epoch: int, part: int = PART) -> None:
        """Draws all words once, to count them, if there is more than one part of about ``part`` samples."""
        self._num_samples, self._key = num_samples, [seed, epoch]
        self._bits = max(-(-num_samples // part) - 1, 0).bit_length()
        counts = np.zeros(1 << self._bits, np.int64)
        if self._bits:
            for _, _, first in self._drawn():
                counts += np.bincount(first, minlength=len(counts))
        else:
            counts[0] = num_samples
        super().__init__(np.cumsum(counts))

    def _make_part(self, number: int) -> np.ndarray:
        dtype = np.uint32 if self._num_samples <= 1 << 32 else np.int64
        count = int(self.ends[number]) - (int(self.ends[number - 1]) if number else 0)
        words, samples, filled = np.empty(count, np.uint64), np.empty(count, dtype), 0
        for start, drawn, first in self._drawn():
            chosen = np.flatnonzero(first == number)
            words[filled : filled + len(chosen)] = drawn[chosen]
            samples[filled : filled + len(chosen)] = chosen + start
            filled += len(chosen)
        return samples[np.argsort(words, kind="stable")]

    def _drawn(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yields chunks of samples: the first of them, their words, and the parts that they belong to, int64."""
        generator = np.random.PCG64(np.random.SeedSequence(self._key))
        for start in range(0, self._num_samples, _CHUNK):
            words = generator.random_raw(min(_CHUNK, self._num_samples - start))
            first = words >> np.uint64(64 - self._bits) if self._bits else np.zeros(len(words), np.uint64)
            yield start, words, first.astype(np.int64)


class Groups(NamedTuple):
    """Which shards are shuffled together."""

    shard_sizes: np.ndarray  # int64 (S,), the samples of each shard
    size: int  # shards per group, at most; 0: one group of all shards, for all steps


class GroupedOrder(_OrderInParts):
    """Shards are shuffled and cut into groups, and the samples of each group are shuffled.

    All samples of a group come before those of the next, so no more than a group has to be available at once.

    Attributes:
        groups: the shards of each group; the sizes of groups differ by at most one.
        ends: as in the base class, with groups as parts.
    """

    def __init__(self, groups: Groups, seed: int, epoch: int) -> None:
        """Draws a word for each shard."""
        sizes = groups.shard_sizes
        self._sizes, self._starts, self._key = sizes, np.cumsum(sizes) - sizes, [seed, epoch]
        shuffled = np.argsort(self._words(0, Stream.SHARDS, len(sizes)), kind="stable")
        self.groups = np.array_split(shuffled, -(-len(sizes) // groups.size))
        super().__init__(np.cumsum([sizes[shards].sum() for shards in self.groups]))

    def _make_part(self, number: int) -> np.ndarray:
        shards = np.sort(self.groups[number])
        samples = np.concatenate([np.arange(self._sizes[shard]) + self._starts[shard] for shard in shards])
        return samples[np.argsort(self._words(number, Stream.GROUP, len(samples)), kind="stable")]

    def _words(self, number: int, stream: Stream, count: int) -> np.ndarray:
        return np.random.PCG64(np.random.SeedSequence([*self._key, number, stream])).random_raw(count)


class StepGroup(NamedTuple):
    """Shards that are needed together, and the first and last step that reads them."""

    first_step: int
    last_step: int
    shards: Sequence[int]


def group_steps(groups: Groups, seed: int, steps: range, batch: int, repeats: int = 1) -> Iterator[StepGroup]:
    """Yields the groups that these steps of ``rank_views`` need, in the order in which they need them."""
    if not groups.size:
        yield StepGroup(steps.start, steps.stop - 1, range(len(groups.shard_sizes)))
        return
    per_pass = steps_per_epoch(int(groups.shard_sizes.sum()), batch) * repeats
    for number in range(steps.start // per_pass, -(-steps.stop // per_pass)):
        order = GroupedOrder(groups, seed, number * repeats)
        start = 0
        for end, shards in zip((order.ends * repeats).tolist(), order.groups, strict=True):
            first, last = start // batch, min((end - 1) // batch, per_pass - 1)
            start = end
            if first <= last and first + number * per_pass < steps.stop and last + number * per_pass >= steps.start:
                yield StepGroup(first + number * per_pass, last + number * per_pass, shards.tolist())


def steps_per_epoch(num_samples: int, batch: int) -> int:
    """Optimizer steps in an epoch; the last incomplete global batch is dropped.

    Raises:
        ValueError: fewer samples than one global batch.
    """
    if num_samples < batch:
        raise ValueError(
            f"{num_samples} samples are fewer than one global batch of {batch}: lower "
            f"train.global_batch_size to at most {num_samples} or add shards"
        )
    return num_samples // batch


def check_divisible(batch: int, world_size: int, accumulation: int) -> None:
    """Raises ValueError, naming the nearest valid sizes, if ranks x micro-batches do not divide a global batch."""
    if min(batch, world_size, accumulation) < 1:
        raise ValueError(f"batch {batch}, ranks {world_size} and accumulation {accumulation} must all be at least 1")
    divisor = world_size * accumulation
    if batch % divisor:
        below, above = batch // divisor * divisor, (batch // divisor + 1) * divisor
        nearest = f"{below} or {above}" if below else f"{above}"
        fewer = next((ranks for ranks in range(world_size - 1, 0, -1) if not batch % (ranks * accumulation)), 0)
        start = f", or start {counted(fewer, 'rank')} (a run that continues keeps its batch size)" if fewer else ""
        raise ValueError(
            f"train.global_batch_size={batch} is not a multiple of {counted(world_size, 'rank')} x "
            f"train.gradient_accumulation_steps={accumulation}: set train.global_batch_size to {nearest}{start}"
        )


def micro_batches(batch: np.ndarray, accumulation: int, rank: int, world_size: int) -> np.ndarray:
    """Returns one rank's part of a global batch, (accumulation, len(batch) / (accumulation * world_size)).

    The batch is cut into micro-batches, each of which is divided among the ranks. So ranks and accumulation decide
    which rank gets a view, never which views a step has.

    Args:
        batch: one-dimensional, divisible by ``accumulation * world_size``.
    """
    assert 0 <= rank < world_size
    return batch.reshape(accumulation, world_size, -1)[:, rank]


def rank_views(
    num_samples: int,
    seed: int,
    steps: range,
    batch: int,
    accumulation: int = 1,
    rank: int = 0,
    world_size: int = 1,
    repeats: int = 1,
    groups: Groups | None = None,
) -> Iterator[Views]:
    """Yields a rank's views, ``accumulation`` micro-batches for each global step.

    A pass goes through all samples once, in the order of its first epoch, and takes ``repeats`` epochs. A sample has
    the same views as in these epochs without repeats, but one after the other, so that one decode serves them. So
    repeats change when a view is shown, but not which views there are or how many steps an epoch has.

    Args:
        num_samples: in the index.
        seed: of all random numbers.
        steps: consecutive global steps; step s is in epoch ``s // steps_per_epoch(num_samples, batch)``.
        batch: global batch, over all ranks and micro-batches.
        accumulation, rank, world_size: as in ``micro_batches``.
        repeats: consecutive views of a sample.
        groups: shards that are shuffled together; without them all samples are.
    """
    per_pass = steps_per_epoch(num_samples, batch) * repeats
    order: EpochOrder | GroupedOrder | None = None
    order_epoch = -1
    for global_step in steps:
        number, step = divmod(global_step, per_pass)
        epoch = number * repeats
        if order is None or epoch != order_epoch:
            order_epoch = epoch
            order = GroupedOrder(groups, seed, epoch) if groups else EpochOrder(num_samples, seed, epoch)
        positions, repeat = np.divmod(np.arange(step * batch, (step + 1) * batch), repeats)
        samples = order.samples(int(positions[0]), int(positions[-1]) + 1)[positions - positions[0]]
        parts = (micro_batches(array, accumulation, rank, world_size) for array in (epoch + repeat, samples))
        yield from map(Views, *parts)


def sample_rng(seed: int, epoch: int, sample: int, stream: Stream) -> np.random.Generator:
    """The random generator of one sample in one epoch, for one purpose."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, sample, stream])))
