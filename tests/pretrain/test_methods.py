"""Tests of MAE, MFF, SimMIM and LocalMIM: naive reference, masks, information leaks, convergence, rejected keys."""

import functools
import math
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import reference, reference_local_mim, reference_mae
from helpers.reference_beit import random_projection_codes
from helpers.tiny import (
    TINY,
    assert_equals_reference,
    random_images,
    random_mask_indices,
    randomize,
    tiny_method,
    train,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.methods import METHODS
from pretrain.methods.masking import block_masked, cell_masked, grid_masked
from pretrain.methods.pr_mim import PRMIMConfig
from pretrain.methods.targets import PatchTarget
from pretrain.methods.targets.pca import PCATarget
from pretrain.methods.targets.pixels import PixelTarget
from pretrain.methods.targets.tokens import TokenTarget
from pretrain.models.patches import ALONE
from pretrain.trainer.config import ModelConfig

GRID, PATCH_SIZE = (4, 6), 2
MAE = {"name": "mae", "decoder_embed_dim": 12, "decoder_depth": 2, "decoder_num_heads": 3}
MFF = MAE | {"name": "mff", "blocks": [1, 2]}
SIMMIM = {"name": "simmim", "mask_patch_size": 4}
LOCAL_MIM = {"name": "local_mim", "blocks": [1, 2], "decoder_embed_dim": 8, "decoder_num_heads": 2}
LOCAL_MIM |= {"target": {"name": "hog", "cell_sizes": [1, 4], "bins": 3}}
PR_MIM = PRMIMConfig(throw_ratio=0.3, kernel_size=3)
CODES = {"vocab_size": 13, "code_dim": 5, "seed": 7}
PIXELS = {"target": {"norm_pix": False}}
PCA = MAE | {"target": {"name": "pca"}}
TOKENS = MAE | {"target": {"name": "tokens", **CODES}}
ENCODER_MASK_TOKENS = MAE | {"encoder_mask_tokens": True}
CROSS = MAE | {"decoder": "cross"}
INTER_BLOCK = CROSS | {"inter_block_attention": True}
CELL = {"mask_type": "cell", "mask_patch_size": 4, "mask_ratio": 0.5}
PART = {"predict_ratio": 0.25}
AGGREGATIONS = ("average", "transformer", "convnext")
CASES = [
    pytest.param(MAE, False, None, id="mae"),
    pytest.param(MAE | PIXELS | {"mask_type": "block", "mask_ratio": 0.5}, False, None, id="mae-block-pixels"),
    pytest.param(MAE | {"mask_type": "grid"}, False, None, id="mae-grid"),
    pytest.param(SIMMIM, False, None, id="simmim"),
    pytest.param(SIMMIM, True, None, id="simmim-relative"),
    pytest.param(PCA, False, None, id="mae-pca"),
    pytest.param(TOKENS, False, None, id="mae-tokens"),
    pytest.param(ENCODER_MASK_TOKENS, False, None, id="mae-encoder_mask_tokens"),
    pytest.param(CROSS, False, None, id="mae-cross"),
    pytest.param(INTER_BLOCK | PART, False, None, id="mae-cross-inter_block-part"),
    pytest.param(MAE | PART, False, None, id="mae-part"),
    pytest.param(INTER_BLOCK, False, PR_MIM, id="mae-cross-inter_block-pr_mim"),
    pytest.param(MAE, False, PR_MIM, id="mae-pr_mim"),
    pytest.param(ENCODER_MASK_TOKENS | PIXELS, False, PR_MIM, id="mae-encoder_mask_tokens-pr_mim"),
    pytest.param(SIMMIM, False, PRMIMConfig(throw_ratio=0.3, sampling="random"), id="simmim-pr_mim"),
    pytest.param(SIMMIM, True, PR_MIM, id="simmim-relative-pr_mim"),
    *(
        pytest.param(MAE, False, PRMIMConfig(throw_ratio=0.4, kernel_size=3, aggregation=kind), id=f"mae-{kind}")
        for kind in AGGREGATIONS
    ),
    pytest.param(SIMMIM, True, PRMIMConfig(throw_ratio=0.3, aggregation="transformer"), id="simmim-transformer"),
    pytest.param(MFF, False, None, id="mff"),
    pytest.param(MFF, False, PR_MIM, id="mff-pr_mim"),
    pytest.param(LOCAL_MIM, False, None, id="local_mim"),
    pytest.param(LOCAL_MIM, True, PR_MIM, id="local_mim-relative-pr_mim"),
]


@functools.cache
def pca_file() -> str:
    """A file with five components and the mean of patches of 12 values."""
    folder = Path(tempfile.mkdtemp())
    vectors, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))
    vectors = vectors.contiguous()
    save_file({"mean": vectors[5].clone(), "components": vectors[:5].clone()}, folder / "pca.safetensors")
    return str(folder / "pca.safetensors")


def build(keys: dict[str, Any], relative: bool, pr_mim: PRMIMConfig | None = None) -> Any:
    if target_name(keys) == "pca":
        keys = keys | {"target": {"name": "pca", "file": pca_file()}}
    return tiny_method(keys, GRID, PATCH_SIZE, relative, pr_mim)


def target_name(keys: dict[str, Any]) -> str:
    return keys.get("target", {}).get("name", "pixels")


def mae_error(target: PatchTarget) -> reference_mae.Error:
    if isinstance(target, PCATarget):
        stored = load_file(pca_file())
        return reference_mae.pca_error(PATCH_SIZE, stored["mean"], stored["components"])
    if isinstance(target, TokenTarget):
        return reference_mae.token_error(lambda image: random_projection_codes(image, PATCH_SIZE, **CODES))
    assert isinstance(target, PixelTarget)
    return reference_mae.pixel_error(PATCH_SIZE, target.norm_pix)


def naive_loss(model: Any, images: Tensor, mask_indices: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    if model.config.name in ("mae", "mff"):
        heads, fused = model.config.decoder_num_heads, getattr(model.config, "blocks", None)
        return reference_mae.mae_loss(images, mask_indices, weights, TINY.heads, heads, mae_error(model.target), fused)
    if model.config.name == "local_mim":
        blocks, sizes = model.config.blocks, model.target.config.cell_sizes
        return reference_local_mim.local_mim_loss(images, mask_indices, weights, TINY.heads, 2, blocks, sizes, bins=3)
    return reference.simmim_loss(images, mask_indices, weights, TINY.heads)


@pytest.mark.parametrize(("keys", "relative", "pr_mim"), CASES)
def test_loss_and_gradients_equal_the_reference(
    keys: dict, relative: bool, pr_mim: PRMIMConfig | None, monkeypatch: pytest.MonkeyPatch
):
    assert_equals_reference(lambda: build(keys, relative, pr_mim), naive_loss, monkeypatch)


@pytest.mark.parametrize(("keys", "relative", "pr_mim"), CASES)
def test_masks_have_exact_counts_and_samplers_are_deterministic(keys: dict, relative: bool, pr_mim: PRMIMConfig | None):
    model = build(keys, relative, pr_mim)
    sampler = pickle.loads(pickle.dumps(model.mask_sampler()))
    first, again, other = (sampler(np.random.default_rng(seed)) for seed in (1, 1, 2))
    patches = GRID[0] * GRID[1]
    share = round(patches * getattr(model.config, "mask_ratio", 0))
    masked = {"mae": share, "mff": share, "local_mim": share, "simmim": math.ceil(6 * 0.6) * 4}
    part = keys.get("predict_ratio")
    assert len(first["visible"]) == patches - masked[model.config.name]
    assert len(first["masked"]) == (patches * part if part else masked[model.config.name])
    both = sorted([*first["visible"], *first["masked"]])
    assert both == sorted({*both}) if part else both == list(range(patches))
    assert all((first[name] == again[name]).all() for name in first)
    if keys.get("mask_type") != "grid":
        assert (first["masked"] != other["masked"]).any()


@pytest.mark.parametrize(("keys", "relative", "pr_mim"), CASES)
def test_prediction_does_not_depend_on_masked_pixels(keys: dict, relative: bool, pr_mim: PRMIMConfig | None):
    model = build(keys, relative, pr_mim)
    randomize(model)
    images, mask_indices = random_images(model), random_mask_indices(model)
    before = model.reconstruct(images, mask_indices)
    masked = before["masked"]
    assert (masked == before["original"]).any()
    changed = (masked != before["original"]).reshape(len(images), -1).float().mean(1)
    assert torch.all(changed <= 1 - len(mask_indices["visible"][0]) / (GRID[0] * GRID[1]))
    predicted = {"tokens": "predicted codes", "hog": "predicted edges"}.get(target_name(keys), ALONE)
    torch.testing.assert_close(model.reconstruct(masked, mask_indices)[predicted], before[predicted])


@pytest.mark.parametrize(
    ("keys", "relative", "pr_mim"),
    [case for case in CASES if target_name(case.values[0]) != "hog"],  # HOG gradients depend on neighboring patches
)
def test_loss_depends_on_exactly_the_masked_patches(keys: dict, relative: bool, pr_mim: PRMIMConfig | None):
    model = build(keys, relative, pr_mim)
    randomize(model)
    with torch.no_grad():
        model.encoder.patch_embed.proj.weight.zero_()  # blind encoder: pixels affect only the target
    images, mask_indices = random_images(model, 1), random_mask_indices(model, 1)
    before = model(images, mask_indices)["loss"]
    for patch in range(GRID[0] * GRID[1]):
        row, col = (PATCH_SIZE * i for i in divmod(patch, GRID[1]))
        changed = images.clone()
        changed[0, row : row + PATCH_SIZE, col : col + PATCH_SIZE] = (
            255 - images[0, row : row + PATCH_SIZE, col : col + PATCH_SIZE]
        )
        assert (model(changed, mask_indices)["loss"] != before) == (patch in mask_indices["masked"][0]), patch


@pytest.mark.parametrize(("keys", "relative", "pr_mim"), CASES)
def test_num_predicted_still_returns_visible_tokens_of_all_images(
    keys: dict, relative: bool, pr_mim: PRMIMConfig | None
):
    model = build(keys, relative, pr_mim)
    randomize(model)
    images, mask_indices = random_images(model, 3), random_mask_indices(model, 3)
    some = model.compute_loss(images, mask_indices, num_predicted=2)
    whole = model.compute_loss(images, mask_indices)
    first = {name: index[:2] for name, index in mask_indices.items()}
    torch.testing.assert_close(some.losses, model(images[:2], first))
    assert torch.equal(some.positions, mask_indices["visible"])
    torch.testing.assert_close(some.visible_tokens, whole.visible_tokens)
    assert some.visible_tokens.shape[:2] == mask_indices["visible"].shape
    changed = images.clone()
    row, col = (PATCH_SIZE * i for i in divmod(int(mask_indices["visible"][0, -1]), GRID[1]))
    changed[0, row : row + PATCH_SIZE, col : col + PATCH_SIZE] = 0
    moved = (model.compute_loss(changed, mask_indices).visible_tokens - whole.visible_tokens).abs().amax(2)
    assert moved[0].argmax() == moved.shape[1] - 1, "a token encodes the patch at its position"
    assert not moved[1:].any()


@pytest.mark.parametrize(("keys", "relative", "pr_mim"), CASES)
def test_overfits_one_image(keys: dict, relative: bool, pr_mim: PRMIMConfig | None):
    model = build(keys, relative, pr_mim)
    losses = train(model, random_images(model, 1), random_mask_indices(model, 1))
    assert losses[-1] < 0.25 * losses[0]


def test_num_masks_averages_the_losses_of_single_masks():
    one, several = (build(MAE | {"num_masks": count}, relative=False) for count in (1, 3))
    for model in (one, several):
        randomize(model)
    images, mask_indices = random_images(several), random_mask_indices(several)
    assert {name: index.shape for name, index in mask_indices.items()} == {
        "visible": (2, 3, 6),
        "masked": (2, 3, 18),
        "kept": (2, 3, 18),
    }
    assert len({tuple(mask) for mask in mask_indices["masked"].flatten(0, 1).tolist()}) == 6
    sampler = one.mask_sampler()
    first = [sampler(np.random.default_rng((3, i)))["masked"] for i in range(2)]
    assert torch.equal(mask_indices["masked"][:, 0], torch.from_numpy(np.stack(first))), "the draws of one mask"
    losses = [one(images, {name: index[:, i] for name, index in mask_indices.items()})["loss"] for i in range(3)]
    torch.testing.assert_close(several(images, mask_indices)["loss"], torch.stack(losses).mean())
    shown = several.reconstruct(images, mask_indices)
    expected = one.reconstruct(images, {name: index[:, 0] for name, index in mask_indices.items()})
    assert all(torch.equal(shown[name], expected[name]) for name in expected)


def test_block_masks_are_contiguous_and_have_exact_counts():
    for count in (1, 30, 75, 147):
        masked = block_masked(np.random.default_rng(0), (14, 14), count)
        assert masked.sum() == count
    neighbors = []
    for seed in range(50):
        grid = block_masked(np.random.default_rng(seed), (14, 14), 75).reshape(14, 14)
        neighbors.append((grid[1:] & grid[:-1]).sum() / grid[1:].sum())
    assert np.mean(neighbors) > 0.7, "a uniform mask would have 0.38"


def test_grid_masks_leave_one_patch_of_each_2x2_visible():
    masked = grid_masked(np.random.default_rng(0), (6, 8), 36).reshape(3, 2, 4, 2)
    assert (masked.sum(axis=(1, 3)) == 3).all()


def test_mae_cell_masks_cover_whole_cells():
    model = build(MAE | CELL, False, PR_MIM)
    drawn = [model.mask_sampler()(np.random.default_rng(seed)) for seed in range(200)]
    for sample in drawn:
        masked = np.bincount(sample["masked"], minlength=24).reshape(2, 2, 3, 2).sum(axis=(1, 3))
        assert sorted(masked.ravel()) == [0, 0, 0, 4, 4, 4]
        assert sorted([*sample["visible"], *sample["masked"]]) == list(range(24))
        assert set(sample["kept"]) < set(sample["masked"])
    assert len({tuple(sample["masked"]) for sample in drawn}) == math.comb(6, 3)


def test_predicted_patches_are_uniform_over_all_positions():
    model = build(CROSS | PART, False)
    drawn = [model.mask_sampler()(np.random.default_rng(seed)) for seed in range(2000)]
    counts = np.bincount(np.concatenate([sample["masked"] for sample in drawn]), minlength=24)
    assert abs(counts / 2000 - 0.25).max() < 0.05
    assert all((sample["kept"] == sample["masked"]).all() for sample in drawn)
    whole = build(CROSS, False).mask_sampler()(np.random.default_rng(5))
    assert (whole["visible"] == drawn[5]["visible"]).all(), "what is shown does not depend on it"


def test_reconstruct_predicts_all_masked_patches_despite_predict_ratio():
    model, whole = build(CROSS | PART, False), build(CROSS, False)
    whole.load_state_dict(model.state_dict())
    images = random_images(model)
    shown, expected = (
        model.reconstruct(images, random_mask_indices(model)),
        whole.reconstruct(images, random_mask_indices(whole)),
    )
    assert all(torch.equal(shown[name], expected[name]) for name in expected)


def test_unused_final_norm_has_no_parameters_with_inter_block_attention():
    model = build(INTER_BLOCK, False)
    assert not [name for name, _ in model.encoder.named_parameters() if name.startswith("norm")]
    assert {name for name in model.encoder.state_dict() if name.startswith("norm.")} == {"norm.weight", "norm.bias"}
    standardized = model.encoder.norm(3 * torch.randn(2, 5, TINY.dim) + 1)
    torch.testing.assert_close(standardized.var(-1, correction=0), torch.ones(2, 5), rtol=1e-4, atol=0)
    assert "norm.weight" in dict(build(CROSS, False).encoder.named_parameters())


def test_cell_masked_masks_whole_cells():
    masked = cell_masked(np.random.default_rng(0), (14, 14), 2, 0.6).reshape(7, 2, 7, 2)
    assert set(masked.sum(axis=(1, 3)).flatten()) == {0, 4}
    assert masked.sum() == 4 * math.ceil(49 * 0.6)


@pytest.mark.parametrize(
    ("keys", "model", "message"),
    [
        (MAE, {"patch_size": 2, "position": "relative"}, "set model.position=sincos"),
        (MAE | {"mask_ratio": 0.01}, {"position": "sincos"}, None),
        (MAE | {"mask_ratio": 0.99}, {"position": "sincos"}, "must be masked and one visible"),
        (MAE | {"mask_type": "grid", "mask_ratio": 0.5}, {"position": "sincos"}, "needs method.mask_ratio=0.75"),
        (MAE | CELL, {"patch_size": 3, "position": "sincos"}, "set method.mask_patch_size=3"),
        (
            MAE | CELL | {"mask_ratio": 0.9},
            {"patch_size": 2, "position": "sincos"},
            "one must be masked and one visible",
        ),
        (MAE | {"inter_block_attention": True}, {"position": "sincos"}, "set method.decoder=cross"),
        (
            MAE | {"predict_ratio": 0.8},
            {"position": "sincos"},
            "19 of 24 patches, but 18 are masked: set it to",
        ),
        (CROSS | {"encoder_mask_tokens": True}, {"position": "sincos"}, "set method.decoder=transformer"),
        (MAE | {"decoder_num_heads": 5}, {"position": "sincos"}, "is not divisible by method.decoder_num_heads=5"),
        (
            {"name": "simmim", "mask_patch_size": 24},
            {"patch_size": 16},
            "must be a multiple of model.patch_size=16 .* set method.mask_patch_size=16",
        ),
        ({"name": "simmim", "mask_patch_size": 128}, {"patch_size": 16}, "divides the image of 64x96 pixels"),
        ({"name": "simmim", "mask_patch_size": 32, "mask_ratio": 0.99}, {"patch_size": 16}, "leaves no patch visible"),
    ],
)
def test_incompatible_keys_are_rejected(keys: dict, model: dict, message: str | None):
    config = METHODS[keys["name"]].Config(**keys)
    if message is None:
        config.check(GRID, ModelConfig(**model))
        return
    with pytest.raises(ValueError, match=message):
        config.check(GRID, ModelConfig(**model))
