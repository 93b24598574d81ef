"""What holds for every method beside LoMaR, whose own tests go further: the reference, masks, gradients, learning."""

import math
import pickle
from typing import Any

import numpy as np
import pytest
import reference
import torch
from tiny import TINY, assert_equals_reference, random_images, random_view, randomize, tiny_vit, train
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.methods import METHODS
from pretrain.methods.masking import block_masked, cell_masked, grid_masked
from pretrain.methods.partial import Partial

GRID, SIDE = (4, 6), 2
MAE = {"name": "mae", "decoder_dim": 12, "decoder_depth": 2, "decoder_heads": 3}
PARTIAL = Partial(throw=0.3, kernel=3)
CASES = [
    pytest.param(MAE, False, None, id="mae"),
    pytest.param(MAE | {"norm_pix": False, "mask": "block", "mask_ratio": 0.5}, False, None, id="mae-block-pixels"),
    pytest.param(MAE | {"mask": "grid"}, False, None, id="mae-grid"),
    pytest.param({"name": "simmim", "cell": 4}, False, None, id="simmim"),
    pytest.param({"name": "simmim", "cell": 4}, True, None, id="simmim-relative"),
    pytest.param(MAE, False, PARTIAL, id="mae-partial"),
    pytest.param({"name": "simmim", "cell": 4}, False, Partial(throw=0.3, sampling="random"), id="simmim-partial"),
    pytest.param({"name": "simmim", "cell": 4}, True, PARTIAL, id="simmim-relative-partial"),
]


def build(keys: dict[str, Any], relative: bool, partial: Partial | None = None) -> Any:
    torch.manual_seed(0)
    method = METHODS[keys["name"]]
    config = method.Config(**keys)
    config.check(GRID, ModelConfig(patch=SIDE, position="relative" if relative else "sincos"))
    return method(config, tiny_vit(SIDE, GRID, relative), partial)


def naive_loss(model: Any, images: Tensor, view: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    if model.config.name == "mae":
        heads = model.config.decoder_heads
        return reference.mae_loss(images, view, weights, TINY.heads, heads, model.config.norm_pix)
    return reference.simmim_loss(images, view, weights, TINY.heads)


@pytest.mark.parametrize(("keys", "relative", "partial"), CASES)
def test_equals_the_reference_in_float64_and_fp32(
    keys: dict, relative: bool, partial: Partial | None, monkeypatch: pytest.MonkeyPatch
):
    assert_equals_reference(lambda: build(keys, relative, partial), naive_loss, monkeypatch)


@pytest.mark.parametrize(("keys", "relative", "partial"), CASES)
def test_view_is_exact_deterministic_and_picklable(keys: dict, relative: bool, partial: Partial | None):
    model = build(keys, relative, partial)
    draw = pickle.loads(pickle.dumps(model.view()))
    first, again, other = (draw(np.random.default_rng(seed)) for seed in (1, 1, 2))
    patches = GRID[0] * GRID[1]
    expected = {"mae": round(patches * getattr(model.config, "mask_ratio", 0)), "simmim": math.ceil(6 * 0.6) * 4}
    assert len(first["masked"]) == expected[model.config.name]
    assert sorted([*first["visible"], *first["masked"]]) == list(range(patches))
    assert all((first[name] == again[name]).all() for name in first)
    if keys.get("mask") != "grid":
        assert (first["masked"] != other["masked"]).any()


@pytest.mark.parametrize(("keys", "relative", "partial"), CASES)
def test_the_prediction_does_not_look_at_what_is_masked(keys: dict, relative: bool, partial: Partial | None):
    model = build(keys, relative, partial)
    randomize(model)
    images, view = random_images(model), random_view(model)
    before = model.reconstruct(images, view)
    grey = before["masked"]
    assert (grey == before["original"]).any()
    patches = GRID[0] * GRID[1]
    shown = (grey != before["original"]).reshape(len(images), -1).float().mean(1)
    assert torch.all(shown <= len(view["masked"][0]) / patches)
    if model.config.name == "mae" and model.config.norm_pix:
        return  # to be shown, a normalised prediction needs the true patch's statistics
    torch.testing.assert_close(model.reconstruct(grey, view)["reconstruction"], before["reconstruction"])


@pytest.mark.parametrize(("keys", "relative", "partial"), CASES)
def test_learns_one_batch_by_heart(keys: dict, relative: bool, partial: Partial | None):
    model = build(keys, relative, partial)
    losses = train(model, random_images(model, 1), random_view(model, 1))
    assert losses[-1] < 0.25 * losses[0]


def test_block_masks_are_blocks_and_exact():
    for count in (1, 30, 75, 147):
        masked = block_masked(np.random.default_rng(0), (14, 14), count)
        assert masked.sum() == count
    neighbours = []
    for seed in range(50):
        grid = block_masked(np.random.default_rng(seed), (14, 14), 75).reshape(14, 14)
        neighbours.append((grid[1:] & grid[:-1]).sum() / grid[1:].sum())
    assert np.mean(neighbours) > 0.7, "a uniform mask would have 0.38"


def test_grid_masks_show_one_of_four_everywhere():
    masked = grid_masked(np.random.default_rng(0), (6, 8), 36).reshape(3, 2, 4, 2)
    assert (masked.sum(axis=(1, 3)) == 3).all()


def test_cells_are_masked_whole():
    masked = cell_masked(np.random.default_rng(0), (14, 14), 2, 0.6).reshape(7, 2, 7, 2)
    assert set(masked.sum(axis=(1, 3)).flatten()) == {0, 4}
    assert masked.sum() == 4 * math.ceil(49 * 0.6)


@pytest.mark.parametrize(
    ("keys", "model", "says"),
    [
        (MAE, {"patch": 2, "position": "relative"}, "set model.position=sincos"),
        (MAE | {"mask_ratio": 0.01}, {"position": "sincos"}, None),
        (MAE | {"mask_ratio": 0.99}, {"position": "sincos"}, "must be masked and one visible"),
        (MAE | {"mask": "grid", "mask_ratio": 0.5}, {"position": "sincos"}, "needs method.mask_ratio=0.75"),
        (MAE | {"decoder_heads": 5}, {"position": "sincos"}, "is not divided by method.decoder_heads=5"),
        ({"name": "simmim", "cell": 24}, {"patch": 16}, "must be a multiple of model.patch=16"),
        ({"name": "simmim", "cell": 128}, {"patch": 16}, "divides the image of 64x96 pixels"),
        ({"name": "simmim", "cell": 32, "mask_ratio": 0.99}, {"patch": 16}, "leaves no patch visible"),
    ],
)
def test_what_does_not_fit_is_refused(keys: dict, model: dict, says: str | None):
    config = METHODS[keys["name"]].Config(**keys)
    if says is None:
        config.check(GRID, ModelConfig(**model))
        return
    with pytest.raises(ValueError, match=says):
        config.check(GRID, ModelConfig(**model))
