"""Tests for HOG targets: comparison with loops over pixels, rendering, and rejected settings."""

import pytest
import torch
from helpers import reference_mae
from helpers.reference_hog import hog_of_patch
from helpers.tiny import TINY, assert_equals_reference, tiny_method
from torch import Tensor

from pretrain.methods.targets import HOGConfig, build_target
from pretrain.methods.targets.hog import _IMAGES_AT_ONCE, histograms
from pretrain.models.patches import patchify
from pretrain.trainer.config import ModelConfig

GRID, PATCH_SIZE = (4, 6), 4


def random_images(count: int = 2) -> Tensor:
    """The first image has a flat corner, and gradients at exactly 0, 45 and 90 degrees (some on bin boundaries)."""
    images = torch.randint(0, 256, (count, 16, 24, 3), generator=torch.Generator().manual_seed(5)).byte()
    images[0, :8, :8] = 77
    images[0, 8:, :8] = (torch.arange(8)[:, None, None] * 9).byte()
    images[0, 8:, 8:16] = ((torch.arange(8)[:, None, None] + torch.arange(8)[:, None]) * 9).byte()
    images[0, :8, 8:16] = (torch.arange(8)[:, None] * 9).byte()
    return images


@pytest.mark.parametrize(
    ("cells", "bins", "window"), [((4,), 9, 0), ((2,), 9, 8), ((1, 2, 4, 8), 12, 0), ((8, 2), 4, 0)]
)
def test_histograms_match_a_loop_over_pixels(cells: tuple[int, ...], bins: int, window: int):
    target = build_target(HOGConfig(cell_sizes=cells, bins=bins, gaussian_window=window), GRID, PATCH_SIZE)
    images = random_images()
    truth = target.ground_truth(images, patchify(images, PATCH_SIZE))
    assert truth.shape == (2, 24, target.num_outputs)
    assert truth.dtype == torch.float32
    for image, found in zip(images, truth, strict=True):
        for position in (0, 1, 2, 8, 9, 12, 14, 15, 23):
            expected = torch.cat([hog_of_patch(image, position, PATCH_SIZE, cell, bins, window) for cell in cells])
            torch.testing.assert_close(found[position].double(), expected, rtol=0, atol=1e-6)


def test_mae_with_hog_targets_equals_the_reference(monkeypatch: pytest.MonkeyPatch):
    sizes = (2, 4)
    keys = {"name": "mae", "decoder_embed_dim": 12, "decoder_depth": 1, "decoder_num_heads": 3}
    keys["target"] = {"name": "hog", "cell_sizes": sizes, "bins": 5}

    def error(prediction: Tensor, image: Tensor, position: int) -> Tensor:
        parts = [hog_of_patch(image, position, PATCH_SIZE, size, bins=5) for size in sizes]
        pairs = zip(prediction.split([len(part) for part in parts]), parts, strict=True)
        return sum((predicted - part).square().mean() for predicted, part in pairs)

    def naive_loss(model, images, mask_indices, weights):
        return reference_mae.mae_loss(images, mask_indices, weights, TINY.heads, 3, error)

    assert_equals_reference(lambda: tiny_method(keys, (2, 4), PATCH_SIZE, relative=False), naive_loss, monkeypatch)


def test_flat_cells_have_zero_histograms():
    target = build_target(HOGConfig(cell_sizes=(2,)), GRID, PATCH_SIZE)
    flat = torch.full((1, 16, 24, 3), 200, dtype=torch.uint8)
    assert not target.ground_truth(flat, patchify(flat, PATCH_SIZE)).any()


def test_targets_do_not_depend_on_brightness_and_contrast():
    target = build_target(HOGConfig(cell_sizes=(2,)), GRID, PATCH_SIZE)
    dark = random_images() // 4
    bright = dark * 3 + 50
    dark_truth, bright_truth = (target.ground_truth(images, patchify(images, PATCH_SIZE)) for images in (dark, bright))
    torch.testing.assert_close(dark_truth, bright_truth)


def test_large_batches_give_the_same_targets_as_single_images():
    images = random_images(_IMAGES_AT_ONCE["cpu"] + 3)
    target = build_target(HOGConfig(cell_sizes=(4,)), GRID, PATCH_SIZE)
    whole = target.ground_truth(images, patchify(images, PATCH_SIZE))
    alone = [target.ground_truth(image[None], image[None]) for image in images]
    assert torch.equal(whole, torch.cat(alone))


def test_autocast_changes_neither_target_nor_loss():
    images = random_images()
    target = build_target(HOGConfig(cell_sizes=(2, 8)), GRID, PATCH_SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = target.ground_truth(images, patchify(images, PATCH_SIZE))
        loss = target.loss(torch.zeros_like(under_autocast).bfloat16(), under_autocast)
    exact = target.ground_truth(images, patchify(images, PATCH_SIZE))
    assert torch.equal(under_autocast, exact)
    assert loss == target.loss(torch.zeros_like(exact), exact)


def test_loss_is_the_sum_over_cell_sizes():
    target = build_target(HOGConfig(cell_sizes=(2, 4), bins=2), GRID, PATCH_SIZE)
    truth = torch.zeros(1, 3, 4 * 6 + 6)
    prediction = truth.clone()
    prediction[..., :24], prediction[..., 24:] = 2, 3
    assert target.loss(prediction, truth) == 4 + 9
    assert target.loss(truth, truth) == 0
    assert target.losses(prediction, truth) == {"loss": 13, "loss_cell_2": 4, "loss_cell_4": 9}


def test_loss_of_each_cell_size_is_logged_without_gradient():
    """Repeated sizes, predicted after different blocks, are numbered. A single size is not logged separately."""
    target = build_target(HOGConfig(cell_sizes=(4, 2, 4), bins=2), GRID, PATCH_SIZE)
    prediction = torch.randn(1, 3, 6 + 24 + 6, requires_grad=True)
    losses = target.losses(prediction, torch.zeros(1, 3, 36))
    assert list(losses) == ["loss", "loss_cell_4_1", "loss_cell_2", "loss_cell_4_2"]
    parts = prediction.detach().square().split([6, 24, 6], dim=-1)
    assert [losses[name].item() for name in list(losses)[1:]] == pytest.approx([part.mean().item() for part in parts])
    assert [name for name, value in losses.items() if value.requires_grad] == ["loss"]
    alone = build_target(HOGConfig(cell_sizes=(4,), bins=2), GRID, PATCH_SIZE)
    assert list(alone.losses(prediction[..., :6], torch.zeros(1, 3, 6))) == ["loss"]


def test_vertical_edge_is_drawn_as_a_vertical_line_in_its_color():
    images = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    images[:, :, 4:, 0] = 255  # red, from the middle of the first cells on
    target = build_target(HOGConfig(cell_sizes=(8,)), (2, 2), 16)
    truth = target.ground_truth(images, images)
    drawn = target.render(-truth, truth)
    assert drawn.keys() == {"edges", "predicted edges"}
    cell = drawn["edges"][0, 0].view(16, 16, 3)[:8, :8]
    assert cell[..., 0].float().mean(0).argmax() in (3, 4)
    assert cell[..., 0].float().mean(0)[[0, 7]].max() < 30
    assert cell[..., 0].float().mean(1).min() > 30
    assert not cell[..., 1:].any()
    assert not drawn["edges"][0, 1].any()
    assert not drawn["predicted edges"].any(), "less than nothing is drawn as nothing"


def test_opposite_directions_share_a_bin():
    images = random_images(1)
    magnitudes, inverted = histograms(images, 4, 9), histograms(255 - images, 4, 9)
    torch.testing.assert_close(magnitudes, inverted)


@pytest.mark.parametrize(
    ("cells", "grid", "message"),
    [
        ((5,), GRID, r"target\.cell_sizes has 5, .* set target\.cell_sizes=\[4\]"),
        ((0, 8), GRID, r"set target\.cell_sizes=\[1, 8\]"),
        ((16,), GRID, "neither divides model.patch_size=4 nor is twice it"),
        (
            (2, 8),
            (3, 6),
            "the grid of 3x6 patches has an odd side: leave 8 out, or set data.image_size to a multiple of 8",
        ),
    ],
)
def test_cell_sizes_that_do_not_fit_are_rejected(cells: tuple[int, ...], grid: tuple[int, int], message: str):
    with pytest.raises(ValueError, match=message):
        HOGConfig(cell_sizes=cells).check(grid, ModelConfig(patch_size=PATCH_SIZE))
    HOGConfig(cell_sizes=(1, 2, 4)).check(grid, ModelConfig(patch_size=PATCH_SIZE))
