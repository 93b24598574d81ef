"""Random sampling of windows and masks."""

import pickle
from fractions import Fraction

import numpy as np
import pytest
from helpers.tiny import random_mask_indices, tiny_lomar

from pretrain.methods.lomar import LoMaR, sample_masks
from pretrain.methods.masking import complementary_masked, random_masked, random_windows, split_positions
from pretrain.trainer.config import ModelConfig

# Table 4 of the paper: window size, windows per image.
ABLATION = [(5, 8), (7, 4), (9, 3), (11, 2), (14, 1)]


def z_scores(counts: np.ndarray, trials: int, probability: float) -> np.ndarray:
    """Deviations of binomial counts from their means, in standard deviations."""
    return (counts - trials * probability) / np.sqrt(trials * probability * (1 - probability))


@pytest.mark.parametrize("ratio", ["0.3", "0.4", "0.5", "0.6", "0.7", "0.75", "0.8", "0.9"])
@pytest.mark.parametrize(("window_size", "num_windows"), ABLATION)
def test_each_window_masks_exactly_the_mask_ratio(window_size: int, num_windows: int, ratio: str):
    config = LoMaR.Config(num_windows=num_windows, window_size=window_size, mask_ratio=float(ratio))
    config.check((14, 14), ModelConfig())
    expected = int(window_size**2 * Fraction(ratio))
    drawn = sample_masks(np.random.default_rng(0), grid=(14, 14), config=config, pr_mim=None)
    assert drawn["masked"].shape == (num_windows, expected)
    assert drawn["visible"].shape == (num_windows, window_size**2 - expected)
    both = np.sort(np.concatenate([drawn["visible"], drawn["masked"]], axis=1))
    assert (both == np.arange(window_size**2)).all(), "visible and masked are all patches, each once"
    assert all((np.diff(drawn[name]) > 0).all() for name in ("visible", "masked"))


@pytest.mark.parametrize("grid", [(14, 14), (9, 16), (16, 9), (7, 7), (7, 8)])
def test_windows_are_distinct_squares_in_raster_order(grid: tuple[int, int]):
    count = min(4, (grid[0] - 6) * (grid[1] - 6))
    for seed in range(50):
        windows = random_windows(np.random.default_rng(seed), count, 7, grid)
        assert windows.shape == (count, 49)
        assert windows.dtype == np.int64
        corners = {divmod(int(window[0]), grid[1]) for window in windows}
        assert len(corners) == count, "distinct"
        for window in windows:
            top, left = divmod(int(window[0]), grid[1])
            assert 0 <= top <= grid[0] - 7
            assert 0 <= left <= grid[1] - 7, "no window runs over the edge into the next row"
            expected = [(top + dy) * grid[1] + left + dx for dy in range(7) for dx in range(7)]
            assert window.tolist() == expected


def test_all_possible_windows_can_be_drawn_but_more_raise():
    windows = random_windows(np.random.default_rng(0), 6, 7, (8, 9))
    assert len({int(window[0]) for window in windows}) == 6
    with pytest.raises(ValueError, match="cannot choose 7 different numbers from 6"):
        random_windows(np.random.default_rng(0), 7, 7, (8, 9))


def test_window_positions_are_uniform_and_cover_every_patch():
    images, count, size, grid = 3000, 4, 7, (12, 16)
    drawn = np.stack([random_windows(np.random.default_rng((5, i)), count, size, grid) for i in range(images)])
    num_corners = (grid[0] - size + 1) * (grid[1] - size + 1)
    rows, cols = np.divmod(drawn[:, :, 0], grid[1])
    counts = np.bincount((rows * (grid[1] - size + 1) + cols).ravel(), minlength=num_corners)
    assert len(counts) == num_corners
    expected = images * count / num_corners
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = num_corners - 1
    assert freedom - 5 * np.sqrt(2 * freedom) < chi_square < freedom + 5 * np.sqrt(2 * freedom)
    assert set(drawn.ravel().tolist()) == set(range(grid[0] * grid[1]))


@pytest.mark.parametrize("sampling", ["same", "complementary"])
@pytest.mark.parametrize(("ratio", "count"), [(0.8, 4), (0.5, 2), (0.4, 3), (0.9, 12)])
def test_repeated_window_gets_several_masks(sampling: str, ratio: float, count: int):
    config = LoMaR.Config(num_windows=count, mask_ratio=ratio, window_sampling=sampling)
    config.check((7, 7), ModelConfig())  # a grid with room for one window only
    places = set()
    for seed in range(30):
        drawn = sample_masks(np.random.default_rng(seed), grid=(14, 14), config=config, pr_mim=None)
        assert drawn["positions"].shape == (count, 49)
        assert (drawn["positions"] == drawn["positions"][0]).all()
        assert drawn["masked"].shape == (count, int(49 * ratio))
        both = np.sort(np.concatenate([drawn["visible"], drawn["masked"]], axis=1))
        assert (both == np.arange(49)).all()
        shown = np.bincount(drawn["visible"].ravel(), minlength=49)
        if sampling == "complementary":  # visible counts differ by at most one
            assert set(shown) <= {count * (49 - int(49 * ratio)) // 49, count * (49 - int(49 * ratio)) // 49 + 1}
        places.add(int(drawn["positions"][0, 0]))
    assert len(places) > 15
    assert sampling == "complementary" or count * (49 - int(49 * ratio)) < 30 or shown.max() > 1


def test_complementary_masks_are_uniform_with_disjoint_visible_patches():
    drawn = np.stack([complementary_masked(np.random.default_rng(seed), 4, 49, 39) for seed in range(4000)])
    assert ((~drawn).sum((0, 1)).sum(), (~drawn).sum(2).max(), (~drawn).sum(1).max()) == (4000 * 40, 10, 1)
    for row in range(4):
        assert np.abs(z_scores(drawn[:, row].sum(0), 4000, 39 / 49)).max() < 5


def test_distinct_windows_use_a_fixed_sequence_of_random_words():
    """The first 64 words, one per possible position, choose the windows; the following words choose the masks."""
    config = LoMaR.Config()
    drawn = sample_masks(np.random.default_rng(3), grid=(14, 14), config=config, pr_mim=None)
    rng = np.random.default_rng(3)
    corners = rng.bit_generator.random_raw(64).argsort()[:4]
    order = rng.bit_generator.random_raw(4 * 49).reshape(4, 49).argsort(axis=1)
    assert (drawn["positions"][:, 0] == corners // 8 * 14 + corners % 8).all()
    assert (drawn["masked"] == np.sort(order[:, :39], axis=1)).all()


def test_each_image_gets_its_own_windows_and_masks():
    # The authors' code uses the same windows for all images of a batch.
    model = tiny_lomar(grid=(14, 14), window_size=7, num_windows=4, mask_ratio=0.8)
    drawn = random_mask_indices(model, 64)
    assert len({tuple(sorted(windows[:, 0].tolist())) for windows in drawn["positions"]}) > 60
    masks = drawn["masked"].flatten(0, 1)
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks)


def test_masked_positions_are_uniform_singly_and_in_pairs():
    rows, length, count = 20000, 12, 7
    masked = random_masked(np.random.default_rng(0), rows, length, count)
    assert (masked.sum(1) == count).all()
    assert np.abs(z_scores(masked.sum(0), rows, count / length)).max() < 5
    together = masked.T.astype(int) @ masked.astype(int)
    pairs = together[np.triu_indices(length, 1)]
    assert np.abs(z_scores(pairs, rows, count * (count - 1) / (length * (length - 1)))).max() < 5


def test_split_positions_returns_visible_and_masked_positions():
    masked = np.array([[True, False, False, True], [False, True, True, False]])
    visible, masked_positions = split_positions(masked)
    assert visible.tolist() == [[1, 2], [0, 3]]
    assert masked_positions.tolist() == [[0, 3], [1, 2]]


def test_mask_indices_depend_only_on_the_generator():
    sampler = tiny_lomar().mask_sampler()
    first, again, other = (sampler(np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert any(not np.array_equal(first[name], other[name]) for name in first)
    assert all(index.dtype == np.int64 for index in first.values())


def test_mask_sampler_pickles_without_the_weights():
    sampler = tiny_lomar().mask_sampler()
    pickled = pickle.dumps(sampler)
    assert len(pickled) < 1000, "the weights are not pickled with it"
    unpickled, original = pickle.loads(pickled)(np.random.default_rng(1)), sampler(np.random.default_rng(1))
    assert all(np.array_equal(unpickled[name], original[name]) for name in original)
