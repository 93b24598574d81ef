"""Tests for BEiT and LoMaR + BEiT: reference comparison, masks, convergence, and a tokenizer outside the model."""

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import reference_beit
from helpers.tiny import (
    TINY,
    assert_equals_reference,
    random_images,
    random_mask_indices,
    randomize,
    tiny_method,
    train,
)
from torch import Tensor

from pretrain.build import build_method
from pretrain.config import PretrainConfig, load
from pretrain.methods.beit import BEiT
from pretrain.methods.lomar import LoMaR
from pretrain.methods.pr_mim import PRMIMConfig
from pretrain.trainer.checkpoint import TrainState, check_continues
from pretrain.trainer.config import ModelConfig
from pretrain.trainer.optim import parameter_groups

GRID, PATCH_SIZE = (4, 6), 2
CODES = {"vocab_size": 13, "code_dim": 5, "seed": 7}
TARGET = {"name": "tokens", **CODES}
IMAGE: dict[str, Any] = {"name": "beit", "mask_ratio": 0.4, "target": TARGET}
WINDOWS: dict[str, Any] = {
    "name": "lomar", "num_windows": 3, "window_size": 3, "mask_type": "random", "mask_ratio": 0.6, "target": TARGET,
}  # fmt: skip
CASES = [
    pytest.param(IMAGE, True, None, id="beit"),
    pytest.param(IMAGE, False, None, id="beit-sincos"),
    pytest.param(IMAGE | {"mask_type": "random"}, True, None, id="beit-random"),
    pytest.param(WINDOWS, True, None, id="lomar"),
    pytest.param(WINDOWS, False, None, id="lomar-sincos"),
    pytest.param(WINDOWS | {"mask_type": "block", "mask_ratio": 0.4}, True, None, id="lomar-block"),
    pytest.param(IMAGE, True, PRMIMConfig(throw_ratio=0.2, kernel_size=3), id="beit-pr_mim"),
    pytest.param(WINDOWS, False, PRMIMConfig(throw_ratio=0.3, kernel_size=3), id="lomar-pr_mim"),
]


def build(keys: dict[str, Any], relative: bool = True, pr_mim: PRMIMConfig | None = None) -> Any:
    return tiny_method(keys, GRID, PATCH_SIZE, relative, pr_mim)


def naive_loss(model: Any, images: Tensor, mask_indices: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    codes = [reference_beit.random_projection_codes(image, PATCH_SIZE, **CODES) for image in images]
    assert model.target.tokenizer(images).tolist() == codes
    return reference_beit.beit_loss(images, mask_indices, codes, weights, TINY.heads, PATCH_SIZE)


@pytest.mark.parametrize(("keys", "relative", "pr_mim"), CASES)
def test_equals_the_reference_in_float64_and_fp32(
    keys: dict, relative: bool, pr_mim: PRMIMConfig | None, monkeypatch: pytest.MonkeyPatch
):
    assert_equals_reference(lambda: build(keys, relative, pr_mim), naive_loss, monkeypatch)


@pytest.mark.parametrize(("keys", "relative", "pr_mim"), CASES)
def test_mask_sampler_is_exact_deterministic_and_picklable(keys: dict, relative: bool, pr_mim: PRMIMConfig | None):
    model = build(keys, relative, pr_mim)
    sampler = pickle.loads(pickle.dumps(model.mask_sampler()))
    first, again, other = (sampler(np.random.default_rng(seed)) for seed in (1, 1, 2))
    windows, length = (3, 9) if keys["name"] == "lomar" else (1, math.prod(GRID))
    visible, masked = (np.atleast_2d(first[name]) for name in ("visible", "masked"))
    if keys["name"] == "lomar":
        assert first["positions"].shape == (windows, length)
        assert first["masked"].ndim == 2
    assert masked.shape == (windows, math.floor(length * keys["mask_ratio"]))
    for shown, hidden in zip(visible, masked, strict=True):
        assert sorted([*shown, *hidden]) == list(range(length))
    assert all((first[name] == again[name]).all() and first[name].dtype == np.int64 for name in first)
    assert (first["masked"] != other["masked"]).any()


def test_number_of_masked_patches_at_the_papers_sizes():
    """BEiT masks 40 % of 14x14 patches. LoMaR + BEiT masks 40 % of each 7x7 window, plain LoMaR 80 %."""
    assert BEiT.Config().count_patches((14, 14), 16)[1] == 78
    assert BEiT.Config(mask_ratio=0.383).count_patches((14, 14), 16)[1] == 75, "as the authors' code"
    assert load("lomar_beit_vitb16_224_300e", ["target.tokenizer=random_projection"]).method.num_masked == 19
    assert LoMaR.Config(mask_ratio=0.8).num_masked == 39


@pytest.mark.parametrize(("keys", "relative", "pr_mim"), CASES)
def test_prediction_does_not_depend_on_masked_pixels(keys: dict, relative: bool, pr_mim: PRMIMConfig | None):
    model = build(keys, relative, pr_mim)
    randomize(model)
    images, mask_indices = random_images(model), random_mask_indices(model)
    before = model.reconstruct(images, mask_indices)
    other = images.clone()
    masked = mask_indices["masked"]
    if "positions" in mask_indices:  # reconstructions show only the first window
        masked = mask_indices["positions"].gather(2, masked)[:, 0]
    for image, positions in zip(other, masked.tolist(), strict=True):
        for row, col in (divmod(position, GRID[1]) for position in positions):
            top, left = row * PATCH_SIZE, col * PATCH_SIZE
            image[top : top + PATCH_SIZE, left : left + PATCH_SIZE] = 77
    after = model.reconstruct(other, mask_indices)
    assert torch.equal(before["predicted codes"], after["predicted codes"])
    assert torch.equal(before["masked"], after["masked"])
    assert not torch.equal(before["codes"], after["codes"])


@pytest.mark.parametrize("keys", [IMAGE, WINDOWS], ids=["beit", "lomar"])
def test_overfits_one_batch(keys: dict):
    model = build(keys)
    images, mask_indices = random_images(model, 1), random_mask_indices(model, 1)
    losses = train(model, images, mask_indices, 150, lr=1e-2)
    assert losses[0] == pytest.approx(math.log(13), rel=0.7)  # 2.6 to 4.2, depending on the mask
    assert losses[-1] < 0.1 * losses[0]
    shown = model.reconstruct(images, mask_indices)
    assert torch.equal(shown["codes"], shown["predicted codes"]), "the right codes have the same colors"


@pytest.mark.parametrize("keys", [IMAGE, WINDOWS], ids=["beit", "lomar"])
def test_tokenizer_is_neither_trained_nor_saved(keys: dict):
    model = build(keys)
    prefixes = ("encoder.", "predictor.head.", "predictor.mask_token")
    assert all(name.startswith(prefixes) for name in model.state_dict())
    assert all(name.startswith(prefixes) for name, _ in model.named_buffers() if name != "predictor.buckets")
    assert not any("target" in name for name, _ in model.named_modules())
    trained = {p for group in parameter_groups(model, 0.05) for p in group["params"]}
    assert trained == {p for _, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "lomar", "num_windows": 2, "window_size": 5}, "set method.window_size to at most 4"),
        ({"name": "lomar", "num_windows": 9, "window_size": 3}, "fits in only 8 places"),
        ({"name": "beit", "mask_ratio": 0.01}, "masks 0 of the image's 24 patches"),
        (
            {"name": "lomar", "num_windows": 1, "window_size": 2, "mask_type": "block", "mask_ratio": 0.1},
            "masks 0 of a window's 4 patches",
        ),
    ],
)
def test_settings_that_do_not_fit_the_grid_are_rejected(keys: dict, message: str):
    method = {"beit": BEiT, "lomar": LoMaR}[keys["name"]]
    with pytest.raises(ValueError, match=message):
        method.Config(**keys).check(GRID, ModelConfig(patch_size=PATCH_SIZE))


def load_beit(*overrides: str) -> PretrainConfig:
    keys = ["data.shards=/nowhere", "data.image_size=[64,96]", "model.arch=vit_tiny", "target.vocab_size=32"]
    return load("beit_vitb16_224_300e", [*keys, "target.tokenizer=random_projection", *overrides])


def test_resuming_with_a_different_tokenizer_raises():
    before, same, other = (
        TrainState(resume_signature=load_beit(f"target.seed={seed}").resume_signature()) for seed in (1, 1, 2)
    )
    check_continues(before, same)
    with pytest.raises(ValueError, match=r"target\.sha256 was"):
        check_continues(before, other)


def test_resolved_recipe_pins_the_tokenizer(tmp_path: Path):
    config = load_beit()
    resolved = tmp_path / "config.yaml"
    resolved.write_text(config.to_yaml())
    assert load(str(resolved), []) == config
    with pytest.raises(ValueError, match=r"not target\.sha256"):
        load(str(resolved), ["target.seed=9"])


def test_initial_weights_do_not_depend_on_the_tokenizer():
    first, other = (build_method(load_beit(f"target.seed={seed}")).state_dict() for seed in (1, 2))
    assert all(torch.equal(first[name], other[name]) for name in first)
