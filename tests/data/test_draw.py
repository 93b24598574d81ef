"""Random numbers from raw words: uniform, the same in every NumPy version, and used for every draw of a sample."""

import ast
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.draw import choice, integer, integers, permutation, permutations, uniform, uniforms
from pretrain.methods.masking import block_masked, random_masked, random_windows

ROOT = Path(__file__).parents[2]


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed])))


class Words:
    """A fake generator that returns these raw words."""

    def __init__(self, *words: int) -> None:
        self.words, self.bit_generator = list(words), self

    def random_raw(self) -> int:
        return self.words.pop(0)


def assert_uniform(counts: np.ndarray, trials: int) -> None:
    """Asserts that every count is within five standard deviations of its mean."""
    share = 1 / counts.size
    assert np.abs(counts - trials * share).max() <= 5 * np.sqrt(trials * share * (1 - share))


def test_uniform_uses_the_first_53_bits_of_each_word() -> None:
    """As NumPy's `random` currently does."""
    ours, theirs = uniforms(generator(3), (50, 4)), generator(3).random((50, 4))
    assert np.array_equal(ours, theirs)
    rng = generator(3)
    assert [uniform(rng) for _ in range(200)] == theirs.ravel().tolist()
    rng = generator(3)
    assert [uniform(rng, -2, 3) for _ in range(200)] == pytest.approx((5 * theirs.ravel() - 2).tolist())
    assert uniform(Words(2**64 - 1)) < 1  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 100])
def test_integers_are_uniform(count: int) -> None:
    drawn = integers(generator(count), count, 20000)
    assert drawn.dtype == np.int64
    assert_uniform(np.bincount(drawn, minlength=count), 20000)


def test_words_that_would_bias_an_integer_are_skipped() -> None:
    """For 3 numbers, one of the 2**32 half words is left over; using it would favor 0."""
    assert integer(Words(0 << 32, 5 << 32), 3) == 0  # type: ignore[arg-type]
    words = Words(0 << 32, (2**32 - 1) << 32)
    assert integer(words, 3) == 2  # type: ignore[arg-type]
    assert words.words == []
    halves = Counter(word * 6 >> 4 for word in range(16) if word * 6 & 15 >= 16 % 6)  # the same with 4 bits
    assert set(halves.values()) == {2}
    assert integer(Words(2**64 - 1), 2**32) == 2**32 - 1  # type: ignore[arg-type]


def test_permutations_are_uniform() -> None:
    """Counts each of the 24 permutations of four elements."""
    rows = permutations(generator(1), 24000, 4)
    assert rows.dtype == np.int64
    assert (np.sort(rows, axis=1) == np.arange(4)).all()
    assert_uniform(np.unique(rows @ [1000, 100, 10, 1], return_counts=True)[1], 24000)


def test_choice_is_uniform_and_without_replacement() -> None:
    rng = generator(2)
    drawn = np.stack([choice(rng, 6, 2) for _ in range(6000)])
    assert (drawn[:, 0] != drawn[:, 1]).all()
    assert_uniform(np.unique(drawn @ [10, 1], return_counts=True)[1], 6000)
    assert sorted(choice(rng, 6, 6).tolist()) == list(range(6))
    with pytest.raises(ValueError, match="cannot choose 7 different numbers from 6"):
        choice(rng, 6, 7)


DRAWN: dict[str, tuple[Callable[[np.random.Generator], object], object]] = {
    "uniform": (uniform, 0.6369616873214543),
    "integer": (lambda rng: [integer(rng, 100) for _ in range(6)], [63, 26, 4, 1, 81, 91]),
    "permutation": (lambda rng: permutation(rng, 8).tolist(), [3, 2, 1, 6, 0, 7, 4, 5]),
    "choice": (lambda rng: choice(rng, 64, 4).tolist(), [11, 3, 20, 13]),
    "windows": (lambda rng: random_windows(rng, 4, 7, (14, 14))[:, 0].tolist(), [17, 3, 32, 19]),
    "random mask": (lambda rng: random_masked(rng, 1, 12, 6)[0].nonzero()[0].tolist(), [1, 2, 3, 6, 8, 11]),
    "block mask": (
        lambda rng: block_masked(rng, (6, 6), 14).nonzero()[0].tolist(),
        [0, 1, 2, 3, 4, 7, 8, 9, 10, 12, 13, 14, 15, 16],
    ),
}


@pytest.mark.parametrize("name", DRAWN)
def test_draws_are_the_same_in_every_release(name: str) -> None:
    """A different value would silently break resuming old runs."""
    draw, expected = DRAWN[name]
    assert draw(generator()) == expected


def _rng_method_calls(path: Path) -> list[str]:
    """Lists the method calls on variables named `rng`."""
    return [
        f"{path.name}:{node.lineno} {node.func.attr}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "rng"
    ]


def test_samples_are_drawn_without_numpys_distributions() -> None:
    files = [*(ROOT / "data").glob("*.py"), *(ROOT / "pretrain/methods").glob("*.py")]
    assert functools.reduce(list.__add__, map(_rng_method_calls, files)) == []
