"""The samples of a step: a pure function of (seed, step, global batch). No I/O, no state."""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """Separate random streams of a sample: another draw from one of them does not change the others."""

    CROP = 0
    MASK = 1
    SECOND_CROP = 2


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """A uniform shuffle of all samples, int64 (num_samples,).

    Sorts raw 64-bit words instead of calling ``permutation``: NumPy guarantees the stream of a bit generator, but not
    that of its distributions.
    """
    words = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_samples)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


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
        raise ValueError(
            f"train.global_batch_size={batch} is not a multiple of {world_size} ranks x "
            f"train.gradient_accumulation_steps={accumulation}: set train.global_batch_size to {nearest}"
        )


def micro_batches(
    order: np.ndarray, step: int, batch: int, accumulation: int, rank: int, world_size: int
) -> np.ndarray:
    """The samples of one rank in a step, int64 (accumulation, batch / (accumulation * world_size)).

    The global batch is a fixed slice of the epoch's order, cut into micro-batches, each of which is divided among the
    ranks; so ranks and accumulation decide which rank gets a sample and never which samples a step has.

    Args:
        order: the epoch's ``epoch_order``.
        step: step within the epoch.
        batch: global batch, divisible by ``accumulation * world_size``.
    """
    assert 0 <= rank < world_size
    assert (step + 1) * batch <= len(order)
    return order[step * batch : (step + 1) * batch].reshape(accumulation, world_size, -1)[:, rank]


def sample_rng(seed: int, epoch: int, sample: int, stream: Stream) -> np.random.Generator:
    """The random generator of one sample in one epoch, for one purpose."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, sample, stream])))
