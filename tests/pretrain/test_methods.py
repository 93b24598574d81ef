"""What holds for every method beside LoMaR, whose own tests go further: the reference, masks, gradients, learning."""

import functools
import math
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import reference, reference_mae
from helpers.reference_beit import random_projection_codes
from helpers.tiny import TINY, assert_equals_reference, random_images, random_mask_indices, randomize, tiny_vit, train
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.methods import METHODS
from pretrain.methods.masking import block_masked, cell_masked, grid_masked
from pretrain.methods.pr_mim import PRMIMConfig

GRID, SIDE = (4, 6), 2
MAE = {"name": "mae", "decoder_dim": 12, "decoder_depth": 2, "decoder_heads": 3}
PARTIAL = PRMIMConfig(throw=0.3, kernel=3)
CODES = {"codes": 13, "dim": 5, "seed": 7}
PCA = MAE | {"target": "pca"}
TOKEN = MAE | {"target": "token", "tokenizer": CODES}
ENCODER_MASKS = MAE | {"encoder_masks": True}
FILLS = ("average", "transformer", "convnext")
CASES = [
    pytest.param(MAE, False, None, id="mae"),
    pytest.param(MAE | {"target": "pixel", "mask": "block", "mask_ratio": 0.5}, False, None, id="mae-block-pixels"),
    pytest.param(MAE | {"mask": "grid"}, False, None, id="mae-grid"),
    pytest.param({"name": "simmim", "cell": 4}, False, None, id="simmim"),
    pytest.param({"name": "simmim", "cell": 4}, True, None, id="simmim-relative"),
    pytest.param(PCA, False, None, id="mae-pca"),
    pytest.param(TOKEN, False, None, id="mae-token"),
    pytest.param(ENCODER_MASKS, False, None, id="mae-encoder_masks"),
    pytest.param(MAE, False, PARTIAL, id="mae-partial"),
    pytest.param(ENCODER_MASKS | {"target": "pixel"}, False, PARTIAL, id="mae-encoder_masks-partial"),
    pytest.param({"name": "simmim", "cell": 4}, False, PRMIMConfig(throw=0.3, sampling="random"), id="simmim-partial"),
    pytest.param({"name": "simmim", "cell": 4}, True, PARTIAL, id="simmim-relative-partial"),
    *(pytest.param(MAE, False, PRMIMConfig(throw=0.4, kernel=3, fill=kind), id=f"mae-{kind}") for kind in FILLS),
    pytest.param(
        {"name": "simmim", "cell": 4}, True, PRMIMConfig(throw=0.3, fill="transformer"), id="simmim-transformer"
    ),
]


@functools.cache
def pca_file() -> str:
    """Five components of patches of 12 values, with a mean."""
    folder = Path(tempfile.mkdtemp())
    vectors, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))
    vectors = vectors.contiguous()
    save_file({"mean": vectors[5].clone(), "components": vectors[:5].clone()}, folder / "pca.safetensors")
    return str(folder / "pca.safetensors")


def build(keys: dict[str, Any], relative: bool, pr_mim: PRMIMConfig | None = None) -> Any:
    torch.manual_seed(0)
    method = METHODS[keys["name"]]
    if keys.get("target") == "pca":
        keys = keys | {"pca": {"file": pca_file()}}
    config = method.Config(**keys)
    config.check(GRID, ModelConfig(patch=SIDE, position="relative" if relative else "sincos"))
    return method(config, tiny_vit(SIDE, GRID, relative), pr_mim)


def mae_error(config: Any) -> reference_mae.Error:
    if config.target == "pca":
        basis = load_file(config.pca.file)
        return reference_mae.pca_error(SIDE, basis["mean"], basis["components"])
    if config.target == "token":
        return reference_mae.token_error(lambda image: random_projection_codes(image, SIDE, **CODES))
    return reference_mae.pixel_error(SIDE, config.target == "norm_pix")


def naive_loss(model: Any, images: Tensor, mask_indices: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    if model.config.name == "mae":
        heads = model.config.decoder_heads
        return reference_mae.mae_loss(images, mask_indices, weights, TINY.heads, heads, mae_error(model.config))
    return reference.simmim_loss(images, mask_indices, weights, TINY.heads)


@pytest.mark.parametrize(("keys", "relative", "pr_mim"), CASES)
def test_equals_the_reference_in_float64_and_fp32(
    keys: dict, relative: bool, pr_mim: PRMIMConfig | None, monkeypatch: pytest.MonkeyPatch
):
    assert_equals_reference(lambda: build(keys, relative, pr_mim), naive_loss, monkeypatch)


@pytest.mark.parametrize(("keys", "relative", "pr_mim"), CASES)
def test_view_is_exact_deterministic_and_picklable(keys: dict, relative: bool, pr_mim: PRMIMConfig | None):
    model = build(keys, relative, pr_mim)
    draw = pickle.loads(pickle.dumps(model.mask_sampler()))
    first, again, other = (draw(np.random.default_rng(seed)) for seed in (1, 1, 2))
    patches = GRID[0] * GRID[1]
    expected = {"mae": round(patches * getattr(model.config, "mask_ratio", 0)), "simmim": math.ceil(6 * 0.6) * 4}
    assert len(first["masked"]) == expected[model.config.name]
    assert sorted([*first["visible"], *first["masked"]]) == list(range(patches))
    assert all((first[name] == again[name]).all() for name in first)
    if keys.get("mask") != "grid":
        assert (first["masked"] != other["masked"]).any()


@pytest.mark.parametrize(("keys", "relative", "pr_mim"), CASES)
def test_the_prediction_does_not_look_at_what_is_masked(keys: dict, relative: bool, pr_mim: PRMIMConfig | None):
    model = build(keys, relative, pr_mim)
    randomize(model)
    images, mask_indices = random_images(model), random_mask_indices(model)
    before = model.reconstruct(images, mask_indices)
    grey = before["masked"]
    assert (grey == before["original"]).any()
    patches = GRID[0] * GRID[1]
    shown = (grey != before["original"]).reshape(len(images), -1).float().mean(1)
    assert torch.all(shown <= len(mask_indices["masked"][0]) / patches)
    if model.config.name == "mae" and model.config.target == "norm_pix":
        return  # to be shown, a normalised prediction needs the true patch's statistics
    predicted = "predicted codes" if keys.get("target") == "token" else "reconstruction"
    torch.testing.assert_close(model.reconstruct(grey, mask_indices)[predicted], before[predicted])


@pytest.mark.parametrize(("keys", "relative", "pr_mim"), CASES)
def test_the_targets_are_all_masked_patches_and_no_visible_one(keys: dict, relative: bool, pr_mim: PRMIMConfig | None):
    model = build(keys, relative, pr_mim)
    randomize(model)
    with torch.no_grad():
        model.encoder.patch_embed.proj.weight.zero_()  # blind: the pixels act through the target only
    images, mask_indices = random_images(model, 1), random_mask_indices(model, 1)
    before = model(images, mask_indices)["loss"]
    for patch in range(GRID[0] * GRID[1]):
        row, col = (SIDE * i for i in divmod(patch, GRID[1]))
        changed = images.clone()
        changed[0, row : row + SIDE, col : col + SIDE] = 255 - images[0, row : row + SIDE, col : col + SIDE]
        assert (model(changed, mask_indices)["loss"] != before) == (patch in mask_indices["masked"][0]), patch


@pytest.mark.parametrize(("keys", "relative", "pr_mim"), CASES)
def test_learning_from_some_images_still_shows_the_visible_tokens_of_all(
    keys: dict, relative: bool, pr_mim: PRMIMConfig | None
):
    model = build(keys, relative, pr_mim)
    randomize(model)
    images, mask_indices = random_images(model, 3), random_mask_indices(model, 3)
    some, whole = model.compute_loss(images, mask_indices, supervised=2), model.compute_loss(images, mask_indices)
    first = {name: index[:2] for name, index in mask_indices.items()}
    torch.testing.assert_close(some.loss, model(images[:2], first)["loss"])
    assert torch.equal(some.place, mask_indices["visible"])
    torch.testing.assert_close(some.seen, whole.seen)
    assert some.seen.shape[:2] == mask_indices["visible"].shape
    changed = images.clone()
    row, col = (SIDE * i for i in divmod(int(mask_indices["visible"][0, -1]), GRID[1]))
    changed[0, row : row + SIDE, col : col + SIDE] = 0
    moved = (model.compute_loss(changed, mask_indices).seen - whole.seen).abs().amax(2)
    assert moved[0].argmax() == moved.shape[1] - 1, "a token stands for the patch at its place"
    assert not moved[1:].any()


@pytest.mark.parametrize(("keys", "relative", "pr_mim"), CASES)
def test_learns_one_batch_by_heart(keys: dict, relative: bool, pr_mim: PRMIMConfig | None):
    model = build(keys, relative, pr_mim)
    losses = train(model, random_images(model, 1), random_mask_indices(model, 1))
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
        (MAE | {"decoder_heads": 5}, {"position": "sincos"}, "is not divided by method.decoder_num_heads=5"),
        (
            {"name": "simmim", "cell": 24},
            {"patch": 16},
            "must be a multiple of model.patch_size=16 .* set method.mask_patch_size=16",
        ),
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
