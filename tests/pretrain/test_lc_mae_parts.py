"""Tests for the pure functions of LC-MAE and AE(k): contrastive losses, Gaussian average, blocks around patches."""

import numpy as np
import pytest
import torch
from helpers import reference_lc_mae as naive

from pretrain.methods.ae import centered_blocks
from pretrain.methods.lc_mae import cross_view_loss, in_view_loss
from pretrain.models.decoder import gaussian_average
from pretrain.models.patches import patchify

PATCH_SIZE = 2


def test_cross_view_loss_compares_shared_patches_and_averages_images():
    v1, v2 = torch.randn(3, 3, 5, dtype=torch.float64), torch.randn(3, 3, 5, dtype=torch.float64)
    masked1 = torch.tensor([[0, 1, 2], [0, 1, 2], [1, 4, 6]])
    masked2 = torch.tensor([[0, 1, 2], [3, 4, 5], [0, 1, 6]])  # all, none, and two of three in common
    by_position = [
        [dict(zip(positions, vectors, strict=True)) for positions, vectors in zip(masked.tolist(), v, strict=True)]
        for masked, v in ((masked1, v1), (masked2, v2))
    ]
    images = [naive.cross_view(a, b) for a, b in zip(*by_position, strict=True)]
    assert images[1] == 0
    torch.testing.assert_close(cross_view_loss(v1, v2, masked1, masked2), sum(images) / 3, rtol=1e-12, atol=0)
    torch.testing.assert_close(cross_view_loss(v1, 3 * v1, masked1, masked1), torch.zeros((), dtype=torch.float64))
    alone = v1[1:2].clone().requires_grad_()
    cross_view_loss(alone, v2[1:2], masked1[1:2], masked2[1:2]).backward()
    assert (alone.grad == 0).all(), "nothing in common: no gradient, and no division by zero"


def test_in_view_loss_compares_pairs_of_patches():
    v, x = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(2, 4, 7, dtype=torch.float64)
    expected = sum(naive.in_view(dict(enumerate(v[b])), dict(enumerate(x[b]))) for b in range(2)) / 2
    torch.testing.assert_close(in_view_loss(v, x), expected, rtol=1e-12, atol=0)
    assert in_view_loss(x * 2, x) < 1e-12


@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (2, 9)])
def test_gaussian_average_has_sigma_1_and_reaches_two_patches(grid: tuple[int, int]):
    average = gaussian_average(*grid).view(*grid, *grid)
    torch.testing.assert_close(average.sum((2, 3)), torch.ones(grid))
    for row, col, r, c in np.ndindex(*average.shape):
        expected = np.exp(-((r - row) ** 2 + (c - col) ** 2) / 2) * (max(abs(r - row), abs(c - col)) <= 2)
        torch.testing.assert_close((average[row, col, r, c] / average[row, col, row, col]).item(), float(expected))


@pytest.mark.parametrize("block_size", [2, 4, 6, 8])
def test_blocks_are_centered_on_patches_and_mirrored_at_the_border(block_size: int):
    images = torch.randint(0, 256, (2, 6, 8, 3), generator=torch.Generator().manual_seed(0)).byte()
    blocks = centered_blocks(images, PATCH_SIZE, block_size)
    assert blocks.dtype == torch.uint8
    for b, i in np.ndindex(2, 12):
        assert (blocks[b, i] == naive.block_around(images[b], *divmod(i, 4), PATCH_SIZE, block_size)).all()
    first = 2 - (block_size - PATCH_SIZE) // 2
    if first >= 0:
        around = images[0, first : first + block_size, first : first + block_size]
        assert (blocks[0, 5].view(block_size, block_size, 3) == around).all(), "far from the border"
    if block_size == PATCH_SIZE:
        assert (blocks == patchify(images, PATCH_SIZE)).all()
