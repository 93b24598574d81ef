"""PR-MIM: token sampling, counts, aggregation, and rejected keys. The methods' tests check its losses."""

import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data.draw import integer
from pretrain.build import build_method
from pretrain.config import load
from pretrain.methods.masking import random_masked, split_positions
from pretrain.methods.pr_mim import PRMIMConfig, choose_kept, furthest_point_sampling
from pretrain.models.aggregation import SpatialAggregation
from pretrain.models.vit import Arch

SMALL = ["model.arch=vit_tiny", "name=x", "data.shards=x"]


def algorithm_1(first: int, masked: list[int], count: int, width: int) -> list[int]:
    """Algorithm 1 of the paper's supplement, line by line, on a matrix of Euclidean distances."""
    points = [divmod(i, width) for i in masked]
    distance = [[math.dist(a, b) for b in points] for a in points]
    s = [0] * len(masked)
    tokens = [first]
    s[first] = 1
    for _ in range(1, count):
        nearest = [min(row[t] for t in tokens) for row in distance]
        i = nearest.index(max(nearest))
        s[i] = 1
        tokens.append(i)
    return [position for position, kept in zip(masked, s, strict=True) if kept]


def one_row(rng: np.random.Generator, masked: np.ndarray, count: int, width: int) -> np.ndarray:
    """The same for one row of positions, with squared integer distances and a random first token."""
    points = np.stack(np.divmod(masked, width), axis=1)
    chosen = [integer(rng, len(masked))]
    nearest = ((points - points[chosen[0]]) ** 2).sum(axis=1)
    for _ in range(count - 1):
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
    return np.sort(masked[chosen])


@pytest.mark.parametrize(("height", "width", "count"), [(14, 14, 49), (7, 9, 5), (3, 20, 12), (14, 14, 1)])
def test_furthest_point_sampling_equals_algorithm_1(height: int, width: int, count: int):
    for seed in range(10):
        masked = np.sort(np.random.default_rng(seed).permutation(height * width)[: int(0.75 * height * width)])
        first = integer(np.random.default_rng((seed, 1)), len(masked))
        kept = furthest_point_sampling(np.random.default_rng((seed, 1)), masked[None], count, (height, width))
        assert kept[0].tolist() == algorithm_1(first, masked.tolist(), count, width)


@pytest.mark.parametrize(
    ("rows", "grid", "masked", "count"),
    [
        (4, (7, 7), 39, 15),  # LoMaR at 224
        (9, (7, 7), 39, 1),
        (6, (7, 7), 39, 39),
        (3, (5, 9), 30, 12),
        (1, (14, 14), 147, 49),  # MAE
        (2, (14, 14), 147, 146),
        (1, (28, 28), 588, 60),
        (2, (3, 200), 450, 20),  # squared distances need more than 16 bits
    ],
)
def test_vectorized_sampling_equals_a_loop_over_rows(rows: int, grid: tuple[int, int], masked: int, count: int):
    """The kept positions and the generator's final state are the same."""
    for seed in range(30):
        vectorized, looped = np.random.default_rng(seed), np.random.default_rng(seed)
        positions = split_positions(random_masked(np.random.default_rng((seed, 2)), rows, grid[0] * grid[1], masked))[1]
        kept = furthest_point_sampling(vectorized, positions, count, grid)
        assert kept.dtype == np.int64
        for row, chosen in zip(positions, kept, strict=True):
            assert np.array_equal(chosen, one_row(looped, row, count, grid[1]))
        assert vectorized.bit_generator.state == looped.bit_generator.state


def test_furthest_sampling_is_more_dispersed_than_random():
    masked = np.arange(196)[None]
    gaps = {}
    for sampling in ("furthest", "random"):
        pr_mim = PRMIMConfig(throw_ratio=0.8, sampling=sampling)
        kept = choose_kept(np.random.default_rng(0), masked, pr_mim, 196, 14)[0]
        points = np.stack(np.divmod(kept, 14), axis=1)
        distances = np.linalg.norm(points[:, None] - points[None], axis=2) + 99 * np.eye(len(kept))
        gaps[sampling] = distances.min(axis=1).mean()
    assert gaps["furthest"] > 1.3 * gaps["random"]


@pytest.mark.parametrize("sampling", ["furthest", "random"])
@pytest.mark.parametrize(
    ("recipe", "kept"),
    [
        # MAE: 25% visible, 25% decoded, 50% discarded.
        (["mae_vitb16_224_1600e", "pr_mim.throw_ratio=0.5"], 49),
        (["simmim_vitb16_224_800e", "pr_mim.throw_ratio=0.3"], 120 - 58),
        # LoMaR: 26 of 50 tokens enter the encoder: the class token, 10 visible and 15 masked ones.
        (["lomar_vitb16_224_400e", "pr_mim.throw_ratio=0.5"], 15),
    ],
)
def test_kept_patches_have_exact_counts_and_are_masked(recipe: list[str], kept: int, sampling: str):
    method = build_method(load(recipe[0], [*SMALL, *recipe[1:], f"pr_mim.sampling={sampling}"]))
    drawn = method.mask_sampler()(np.random.default_rng(0))
    assert drawn["kept"].shape[-1] == kept
    rows = zip(np.atleast_2d(drawn["kept"]), np.atleast_2d(drawn["masked"]), strict=True)
    assert all(len(set(k)) == kept and set(k) <= set(m) for k, m in rows)


def test_throw_ratio_larger_than_the_mask_ratio_is_rejected():
    with pytest.raises(ValueError, match=r"pr_mim.throw_ratio=0.75 throws 147 of 196 patches, but only 147 are masked"):
        load("mae_vitb16_224_1600e", [*SMALL, "pr_mim.throw_ratio=0.75"])


def test_mask_token_block_after_the_last_block_is_rejected():
    with pytest.raises(
        ValueError, match=r"method.mask_token_block=12, but vit_tiny has 12 blocks: set it to at most 11"
    ):
        load("lomar_vitb16_224_400e", [*SMALL, "method.mask_token_block=12"])


@pytest.mark.parametrize("kind", ["conv", "average", "transformer", "convnext"])
def test_aggregation_keeps_known_tokens_and_fills_in_the_others(kind: str):
    """The grid is one row. Only positions 0 and 1 are known, so a kernel of 3 does not reach positions 3 and 4."""
    torch.manual_seed(0)
    aggregation = SpatialAggregation(kind, Arch(8, 1, 2), (1, 5), kernel_size=3)
    tokens, known, everywhere = torch.randn(1, 2, 8), torch.tensor([[1, 0]]), torch.arange(5)[None]
    before = aggregation(tokens, known, everywhere)[0]
    assert torch.equal(before[:2], tokens[0, [1, 0]])
    changed = (aggregation(tokens.flip(2), known, everywhere)[0] != before).any(1).tolist()
    assert changed[2:] == ([True] * 3 if kind == "transformer" else [True, False, False])
    assert len(before[2:].unique(dim=0)) == (3 if kind == "transformer" else 2), "positions are told apart"
    if kind == "average":
        torch.testing.assert_close(before[2], tokens[0, 0])
        assert not before[3:].any()


def test_aggregation_flops_equal_table_12():
    """Multiply-adds (G) of a 512-wide decoder on 14x14 patches; the paper's 0.65 and 0.41 are truncated."""
    counted = {}
    for kind in ("conv", "convnext", "transformer"):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            aggregation = SpatialAggregation(kind, Arch(512, 8, 16), (14, 14), kernel_size=7)
            aggregation.aggregate(torch.empty(1, 196, 512), torch.empty(1, 196, 1))
        counted[kind] = counter.get_total_flops() / 2e9
    assert counted == {
        "conv": pytest.approx(196 * 512 * 49 / 1e9),
        "convnext": pytest.approx((196 * 512 * 49 + 196 * 8 * 512**2) / 1e9),
        "transformer": pytest.approx((196 * 12 * 512**2 + 2 * 196**2 * 512) / 1e9),
    }
    assert f"{counted['transformer']:.3f} {counted['convnext']:.3f}" == "0.656 0.416"
