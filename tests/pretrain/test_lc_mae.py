"""Tests for LC-MAE and AE(k): comparison with `reference_lc_mae.py`, and the settings and effects in the paper."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from helpers import reference_lc_mae as naive
from helpers.tiny import (
    TINY,
    assert_equals_reference,
    loss_and_gradients,
    random_images,
    random_mask_indices,
    randomize,
    tiny_method,
    train,
)
from torch import Tensor, nn

from pretrain.config import load
from pretrain.methods import METHODS
from pretrain.methods.ae import centered_blocks
from pretrain.methods.pr_mim import PRMIMConfig
from pretrain.models.patches import patchify, pixel_target
from pretrain.trainer.config import ModelConfig

GRID, PATCH_SIZE = (3, 4), 2
SMALL = {"decoder_embed_dim": 12, "decoder_depth": 2, "decoder_num_heads": 3}
PIXELS = {"target": {"norm_pix": False}}
LC_MAE = {"name": "lc_mae", "proj_dim": 10, **SMALL}
AE = {"name": "ae", "block_size": 2, **SMALL}
SETTINGS = {
    "a": (1.0, 1.0, 1.0), "b": (1.0, 0.0, 0.0), "c": (0.0, 1.0, 0.0), "d": (0.0, 0.0, 1.0),
    "e": (1.0, 1.0, 0.0), "f": (1.0, 0.0, 1.0), "g": (0.0, 1.0, 1.0),
}  # fmt: skip


def setting(name: str, **keys: Any) -> dict[str, Any]:
    return LC_MAE | dict(zip(("w_mae", "w_cross", "w_in"), SETTINGS[name], strict=True)) | keys


CASES = [
    *(pytest.param(setting(name), id=name) for name in SETTINGS),
    pytest.param(LC_MAE | PIXELS | {"w_mae": 0.5, "w_cross": 2.0, "w_in": 3.0}, id="weighted-pixels"),
    pytest.param(LC_MAE | {"mask_ratio": 0.4}, id="few-shared"),
    pytest.param(LC_MAE | {"pr_mim": PRMIMConfig(throw_ratio=0.3, kernel_size=3)}, id="pr_mim"),
    pytest.param(LC_MAE | {"encoder_mask_tokens": True}, id="encoder_mask_tokens"),
    pytest.param(LC_MAE | {"decoder": "average"}, id="average"),
    pytest.param(LC_MAE | {"decoder": "conv"}, id="conv"),
    *(pytest.param(AE | {"block_size": block_size}, id=f"ae-{block_size}") for block_size in (2, 4, 8)),
    pytest.param(AE | PIXELS | {"block_size": 6}, id="ae-6-pixels"),
]


def build(keys: dict[str, Any], grid: tuple[int, int] = GRID) -> Any:
    section = {name: value for name, value in keys.items() if name != "pr_mim"}
    return tiny_method(section, grid, PATCH_SIZE, relative=False, pr_mim=keys.get("pr_mim"))


def naive_loss(model: Any, images: Tensor, mask_indices: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    c = model.config
    if c.name == "ae":
        keys = (c.decoder_num_heads, c.block_size, model.target.norm_pix)
        return naive.ae_loss(images, weights, TINY.heads, *keys)
    factors = (c.w_mae, c.w_cross, c.w_in)
    return naive.lc_mae_loss(
        images, mask_indices, weights, TINY.heads, c.decoder_num_heads, c.decoder, factors, model.target.norm_pix
    )


@pytest.mark.parametrize("keys", CASES)
def test_equals_the_reference_in_float64_and_fp32(keys: dict, monkeypatch: pytest.MonkeyPatch):
    assert_equals_reference(lambda: build(keys), naive_loss, monkeypatch)


@pytest.mark.parametrize("name", SETTINGS)
def test_active_loss_terms_are_logged_and_add_up_to_the_loss(name: str):
    model = build(setting(name))
    result = model(random_images(model), random_mask_indices(model))
    terms = {key: value for key, value in result.items() if key != "loss"}
    expected = {f"loss_{key}" for key, factor in zip(("mae", "cross", "in"), SETTINGS[name], strict=True) if factor}
    assert terms.keys() == expected
    assert not any(term.requires_grad for term in terms.values())
    torch.testing.assert_close(sum(terms.values()), result["loss"].detach())
    assert (model.proj is None) == (name == "b")


def test_losses_are_fp32_under_autocast():
    model = build(LC_MAE)
    images, mask_indices = random_images(model), random_mask_indices(model)
    with torch.autocast("cpu", torch.bfloat16):
        result = model(images, mask_indices)
    assert {value.dtype for value in result.values()} == {torch.float32}
    for name, value in model(images, mask_indices).items():
        torch.testing.assert_close(result[name], value, rtol=0.02, atol=0.005)


def test_losses_do_not_depend_on_patches_visible_in_both_views(monkeypatch: pytest.MonkeyPatch):
    model = build(LC_MAE | {"mask_ratio": 0.5})
    images, mask_indices = random_images(model, 1), random_mask_indices(model, 1)
    visible = set(mask_indices["visible"][0, 0].tolist()) & set(mask_indices["visible"][0, 1].tolist())
    masked = set(range(GRID[0] * GRID[1])) - visible
    assert visible
    assert masked
    prediction = torch.randn(2, mask_indices["masked"].shape[2], PATCH_SIZE**2 * 3)
    monkeypatch.setattr(model, "_predict", lambda *_, **__: prediction)
    before = model(images, mask_indices)

    def after_changing(positions: set[int]) -> dict[str, Tensor]:
        changed = images.clone()
        for row, col in (divmod(i, GRID[1]) for i in positions):
            noise = torch.randint(
                0, 256, (PATCH_SIZE, PATCH_SIZE, 3), generator=torch.Generator().manual_seed(row * 9 + col)
            )
            changed[0, row * PATCH_SIZE : (row + 1) * PATCH_SIZE, col * PATCH_SIZE : (col + 1) * PATCH_SIZE] = (
                noise.byte()
            )
        return model(changed, mask_indices)

    assert after_changing(visible) == before
    other = after_changing(masked)
    assert other["loss_mae"] != before["loss_mae"]
    assert other["loss_in"] != before["loss_in"]


@pytest.mark.parametrize("decoder", ["transformer", "average", "conv"])
def test_prediction_does_not_depend_on_masked_pixels(decoder: str):
    model = build(LC_MAE | PIXELS | {"decoder": decoder})
    randomize(model)
    images, mask_indices = random_images(model), random_mask_indices(model)
    before = model.reconstruct(images, mask_indices)
    assert (before["masked"] != images).any()
    torch.testing.assert_close(
        model.reconstruct(before["masked"], mask_indices)["reconstruction"], before["reconstruction"], rtol=0, atol=0
    )


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75])
def test_mask_sampler_is_exact_deterministic_and_picklable(ratio: float):
    grid = (4, 6)
    sampler = pickle.loads(pickle.dumps(build(LC_MAE | {"mask_ratio": ratio}, grid).mask_sampler()))
    first, again, other = (sampler(np.random.default_rng(seed)) for seed in (1, 1, 2))
    masked = 24 - int(24 * (1 - ratio))
    assert first["masked"].shape == (2, masked)
    assert first["visible"].shape == (2, 24 - masked)
    for visible_positions, masked_positions in zip(first["visible"], first["masked"], strict=True):
        assert sorted([*visible_positions, *masked_positions]) == list(range(24))
    assert (first["masked"][0] != first["masked"][1]).any(), "the two masks are drawn independently"
    assert all((first[name] == again[name]).all() for name in first)
    assert (first["masked"] != other["masked"]).any()


def test_two_masks_overlap_as_much_as_independent_ones():
    sampler = build(LC_MAE, (4, 6)).mask_sampler()
    views = [sampler(np.random.default_rng(seed))["masked"] for seed in range(200)]
    shared = [len(set(first) & set(second)) for first, second in views]
    assert abs(np.mean(shared) - 24 * 0.75**2) < 0.25
    assert min(shared) >= 12, "more than half masked: never none in common"


def test_forward_is_deterministic():
    model = build(LC_MAE)
    images, mask_indices = random_images(model), random_mask_indices(model)
    first, second = (loss_and_gradients(model, images, mask_indices)[0] for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    "keys",
    [
        setting("a"),
        setting("b", decoder="average"),
        setting("b", decoder="conv"),
        setting("e", target={"name": "tokens", "vocab_size": 13, "code_dim": 5}),
        setting("g"),
        AE | {"block_size": 6},
    ],
    ids=["a", "average", "conv", "tokens", "g", "ae"],
)
def test_overfits_one_batch(keys: dict):
    model = build(keys)
    losses = train(model, random_images(model, 1), random_mask_indices(model, 1), 200)
    assert losses[-1] < 0.25 * losses[0]


def test_cross_view_loss_collapses_without_the_in_view_loss():
    """Table 1: setting (g) spreads the vectors out, then (c), the cross-view loss alone, collapses them again."""
    g, c = build(setting("g")), build(setting("c"))
    images, new_masks = random_images(g), random_mask_indices(g)
    train(g, images, None, 80)
    similarity, variance = _spread(g, images, new_masks)
    assert similarity < 0.5
    c.load_state_dict(g.state_dict())
    error = _pixel_error(c, images, new_masks)
    train(c, images, None, 120)
    collapsed_similarity, collapsed_variance = _spread(c, images, new_masks)
    assert collapsed_similarity > 0.95, "all patches of all images have one vector"
    assert collapsed_variance < 0.1 * variance
    assert c(images, new_masks)["loss_cross"] < 1e-3
    assert _pixel_error(c, images, new_masks) > 0.95 * error, "and nothing is reconstructed"


def _spread(model: Any, images: Tensor, mask_indices: dict[str, Tensor]) -> tuple[float, float]:
    """Mean cosine similarity over all pairs of a batch's projected vectors, and the variance of their directions."""
    with torch.no_grad():
        patches = patchify(images, PATCH_SIZE).repeat_interleave(2, dim=0)
        prediction = model._predict(
            patches, **{name: positions.flatten(0, 1) for name, positions in mask_indices.items()}
        )
        directions = nn.functional.normalize(model.proj(prediction), dim=-1).flatten(0, 1)
    return (directions @ directions.T).mean().item(), directions.var(0).sum().item()


def _pixel_error(model: Any, images: Tensor, mask_indices: dict[str, Tensor]) -> float:
    reconstruction = model.reconstruct(images, mask_indices)["reconstruction"]
    return (reconstruction.float() - images.float()).square().mean().item()


def test_ae_reconstructs_images_from_the_centers_of_its_blocks(monkeypatch: pytest.MonkeyPatch):
    model = build(AE | {"block_size": 6, "target": {"norm_pix": True}})
    images, mask_indices = random_images(model), random_mask_indices(model)
    assert mask_indices == {}
    monkeypatch.setattr(model, "_predict", lambda images: pixel_target(centered_blocks(images, PATCH_SIZE, 6), True))
    assert (model.reconstruct(images, mask_indices)["reconstruction"] == images).all()


@pytest.mark.parametrize(
    ("keys", "model", "message"),
    [
        (LC_MAE, {"position": "relative"}, "method lc_mae .* set model.position=sincos"),
        (LC_MAE | {"w_mae": 0, "w_cross": 0, "w_in": 0}, {}, "nothing is learned"),
        (LC_MAE | {"mask_ratio": 0.01}, {}, "raise method.mask_ratio=0.01"),
        (LC_MAE | {"mask_ratio": 0.01, "w_in": 0}, {}, None),
        (LC_MAE | {"mask_type": "grid"}, {}, "set method.mask_type=random"),
        (LC_MAE | {"mask_ratio": 0.99}, {}, "at least one must be masked and one visible"),
        (AE, {"position": "relative"}, "method ae .* set model.position=sincos"),
        (
            AE | {"block_size": 15},
            {"patch_size": 16},
            "method.block_size=15 must equal model.patch_size=16 or exceed it by an even number",
        ),
        (
            AE | {"block_size": 49},
            {"patch_size": 16},
            "method.block_size=49 must equal model.patch_size=16 or exceed it by an even number",
        ),
        (AE | {"block_size": 144}, {"patch_size": 16}, "too far to mirror an image of 64x96: lower it"),
        (AE | {"block_size": 142}, {"patch_size": 16}, None),
        (AE | {"decoder_num_heads": 5}, {"patch_size": 2}, "is not divisible by method.decoder_num_heads=5"),
    ],
)
def test_incompatible_settings_are_rejected(keys: dict, model: dict, message: str | None):
    config = METHODS[keys["name"]].Config(**keys)
    arguments = (4, 6), ModelConfig(**{"position": "sincos"} | model)
    if message is None:
        config.check(*arguments)
        return
    with pytest.raises(ValueError, match=message):
        config.check(*arguments)


def test_recipes_match_the_paper():
    lc_mae, ae = load("lc_mae_vitb16_224_100e", []), load("ae_vitb16_224_100e", [])
    assert (lc_mae.optim.base_lr, lc_mae.train.global_batch_size, lc_mae.train.epochs) == (6e-4, 1024, 100)
    assert (lc_mae.optim.warmup_epochs, lc_mae.method.decoder_depth, lc_mae.method.proj_dim) == (20, 2, 1024)
    assert ae.method.block_size == 112
    for block_size in (16, 48, 80):
        load("ae_vitb16_224_100e", [f"method.block_size={block_size}"])


def test_pr_mim_needs_masks_and_a_transformer_decoder():
    assert load("lc_mae_vitb16_224_100e", ["pr_mim.throw_ratio=0.5"]).pr_mim.throw_ratio == 0.5
    with pytest.raises(ValueError, match=r"method\.decoder=conv is not: leave pr_mim out"):
        load("lc_mae_vitb16_224_100e", ["pr_mim.throw_ratio=0.5", "method.decoder=conv"])
    with pytest.raises(ValueError, match=r"not with ae: leave it out"):
        load("ae_vitb16_224_100e", ["pr_mim.throw_ratio=0.5"])
