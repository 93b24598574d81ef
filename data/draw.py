"""Random numbers made from the raw words of a bit generator.

NumPy guarantees the stream of a bit generator in all versions, but not what the distributions of `Generator` make of
it. So everything drawn for a sample (crops, colors, masks) is made from raw 64-bit words here.
"""

import math

import numpy as np

MASKS = "drawn from raw words"  # as runs record it: an older run would continue with other masks
_UNIT = 2.0**-53


def uniform(rng: np.random.Generator, lowest: float = 0.0, highest: float = 1.0) -> float:
    """A number from `lowest` to `highest`, with 53 random bits."""
    return lowest + (highest - lowest) * ((rng.bit_generator.random_raw() >> 11) * _UNIT)


def uniforms(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draws numbers in [0, 1), float64."""
    words = rng.bit_generator.random_raw(math.prod(shape))
    return ((words >> np.uint64(11)) * _UNIT).reshape(shape)


def integer(rng: np.random.Generator, count: int) -> int:
    """Draws a number from 0 to `count` - 1 with equal probability: Lemire's method on 32 bits.

    Args:
        rng: gives one word, and another where that would bias the result.
        count: at most 2**32.
    """
    while True:
        product = (rng.bit_generator.random_raw() >> 32) * count
        if product & 0xFFFFFFFF >= (1 << 32) % count:
            return product >> 32


def integers(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Draws `size` numbers by `integer`, int64."""
    return np.array([integer(rng, count) for _ in range(size)], np.int64)


def permutation(rng: np.random.Generator, count: int) -> np.ndarray:
    """0 to `count` - 1 in random order, int64."""
    return permutations(rng, 1, count)[0]


def permutations(rng: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """A permutation of 0 to `count` - 1 in each row, int64 (rows, count)."""
    words = rng.bit_generator.random_raw(rows * count).reshape(rows, count)
    return words.argsort(axis=1).astype(np.int64, copy=False)  # no two words are equal, within the age of the universe


def choice(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Draws `size` distinct numbers from 0 to `count` - 1 in random order, int64.

    Raises:
        ValueError: `size` is over `count`.
    """
    if size > count:
        raise ValueError(f"cannot choose {size} different numbers from {count}")
    return permutation(rng, count)[:size]
