"""Random numbers out of the raw words of a bit generator.

NumPy guarantees the stream of a bit generator in all of its versions, but not what the distributions of `Generator`
make of it. So all that is drawn for a sample (crops, colors, masks) is made of raw 64-bit words here.
"""

import math

import numpy as np

MASKS = "drawn from raw words"  # as a run records it: one of before would continue with other masks
_UNIT = 2.0**-53


def uniform(rng: np.random.Generator, lowest: float = 0.0, highest: float = 1.0) -> float:
    """A number from `lowest` to `highest`, with 53 random bits."""
    return lowest + (highest - lowest) * ((rng.bit_generator.random_raw() >> 11) * _UNIT)


def uniforms(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers from 0 to 1 without 1, float64."""
    words = rng.bit_generator.random_raw(math.prod(shape))
    return ((words >> np.uint64(11)) * _UNIT).reshape(shape)


def integer(rng: np.random.Generator, count: int) -> int:
    """A number from 0 to `count` - 1, each as likely as any other: Lemire's method on 32 bits.

    Args:
        rng: gives one word, and another where that would make some numbers likelier.
        count: at most 2**32.
    """
    while True:
        product = (rng.bit_generator.random_raw() >> 32) * count
        if product & 0xFFFFFFFF >= (1 << 32) % count:
            return product >> 32


def integers(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """`size` numbers of `integer`, int64."""
    return np.array([integer(rng, count) for _ in range(size)], np.int64)


def permutation(rng: np.random.Generator, count: int) -> np.ndarray:
    """0 to `count` - 1 in random order, int64."""
    return permutations(rng, 1, count)[0]


def permutations(rng: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """A permutation of 0 to `count` - 1 in each row, int64 (rows, count)."""
    words = rng.bit_generator.random_raw(rows * count).reshape(rows, count)
    return words.argsort(axis=1).astype(np.int64, copy=False)  # no two words are equal, within the age of the universe


def choice(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """`size` different ones of 0 to `count` - 1 in random order, int64.

    Raises:
        ValueError: there are fewer.
    """
    if size > count:
        raise ValueError(f"{size} different numbers cannot be chosen of {count}")
    return permutation(rng, count)[:size]
