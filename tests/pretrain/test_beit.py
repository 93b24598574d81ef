"""BEiT and LoMaR + BEiT against the reference; masks, learning, and that the tokenizer is no part of the model."""

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import reference_beit
from helpers.tiny import TINY, assert_equals_reference, random_images, random_mask_indices, randomize, tiny_vit, train
from torch import Tensor

from pretrain.build import build_method
from pretrain.config import ModelConfig, load
from pretrain.methods.beit import BEiT
from pretrain.methods.pr_mim import PRMIMConfig
from pretrain.trainer.checkpoint import TrainState, check_continues
from pretrain.trainer.optim import parameter_groups

GRID, SIDE = (4, 6), 2
CODES = {"codes": 13, "dim": 5, "seed": 7}
IMAGE: dict[str, Any] = {"mask_ratio": 0.4, "tokenizer": CODES}
WINDOWS = IMAGE | {"windows": 3, "window": 3, "mask": "random", "mask_ratio": 0.6}
CASES = [
    pytest.param(IMAGE, True, None, id="beit"),
    pytest.param(IMAGE, False, None, id="beit-sincos"),
    pytest.param(IMAGE | {"mask": "random"}, True, None, id="beit-random"),
    pytest.param(WINDOWS, True, None, id="windows"),
    pytest.param(WINDOWS, False, None, id="windows-sincos"),
    pytest.param(WINDOWS | {"mask": "block", "mask_ratio": 0.4}, True, None, id="windows-block"),
    pytest.param(IMAGE, True, PRMIMConfig(throw=0.2, kernel=3), id="beit-partial"),
    pytest.param(WINDOWS, False, PRMIMConfig(throw=0.3, kernel=3), id="windows-partial"),
]


def build(keys: dict[str, Any], relative: bool = True, pr_mim: PRMIMConfig | None = None) -> BEiT:
    torch.manual_seed(0)
    config = BEiT.Config(**keys)
    config.check(GRID, ModelConfig(patch=SIDE))
    return BEiT(config, tiny_vit(SIDE, GRID, relative), pr_mim)


def naive_loss(model: BEiT, images: Tensor, mask_indices: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    codes = [reference_beit.random_projection_codes(image, SIDE, **CODES) for image in images]
    assert model.target.tokenizer(images).tolist() == codes
    return reference_beit.beit_loss(images, mask_indices, codes, weights, TINY.heads, SIDE, model.config.area(GRID))


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
    windows, length = (3, 9) if keys.get("windows") else (1, math.prod(GRID))
    assert first["window"].shape == (windows, length)
    assert first["masked"].shape == (windows, math.floor(length * keys["mask_ratio"]))
    for visible, masked in zip(first["visible"], first["masked"], strict=True):
        assert sorted([*visible, *masked]) == list(range(length))
    assert all((first[name] == again[name]).all() and first[name].dtype == np.int64 for name in first)
    assert (first["masked"] != other["masked"]).any()


def test_masks_at_the_papers_sizes():
    """BEiT masks 40 % of 14x14 patches, LoMaR + BEiT as much of each 7x7 window (or LoMaR's 80 %)."""
    assert BEiT.Config().count((14, 14))[1] == 78
    assert BEiT.Config(mask_ratio=0.383).count((14, 14))[1] == 75, "as the authors' code"
    assert BEiT.Config(windows=4).count((14, 14))[1] == 19
    assert BEiT.Config(windows=4, mask="random", mask_ratio=0.8).count((14, 14))[1] == 39


@pytest.mark.parametrize(("keys", "relative", "pr_mim"), CASES)
def test_the_prediction_does_not_look_at_what_is_masked(keys: dict, relative: bool, pr_mim: PRMIMConfig | None):
    model = build(keys, relative, pr_mim)
    randomize(model)
    images, mask_indices = random_images(model), random_mask_indices(model)
    augmentations = model.reconstruct(images, mask_indices)
    other = images.clone()
    rows = mask_indices["window"].gather(2, mask_indices["masked"])[:, 0]
    for image, masked in zip(other, rows.tolist(), strict=True):
        for row, col in (divmod(place, GRID[1]) for place in masked):
            image[row * SIDE : (row + 1) * SIDE, col * SIDE : (col + 1) * SIDE] = 77
    again = model.reconstruct(other, mask_indices)
    assert torch.equal(augmentations["predicted codes"], again["predicted codes"])
    assert torch.equal(augmentations["masked"], again["masked"])
    assert not torch.equal(augmentations["codes"], again["codes"])


@pytest.mark.parametrize("keys", [IMAGE, WINDOWS], ids=["beit", "windows"])
def test_learns_one_batch_by_heart(keys: dict):
    model = build(keys)
    images, mask_indices = random_images(model, 1), random_mask_indices(model, 1)
    losses = train(model, images, mask_indices, 150, lr=1e-2)
    assert losses[0] == pytest.approx(math.log(13), rel=0.4)
    assert losses[-1] < 0.1 * losses[0]
    augmentations = model.reconstruct(images, mask_indices)
    assert torch.equal(augmentations["codes"], augmentations["predicted codes"]), (
        "the right codes have the same colours"
    )


@pytest.mark.parametrize("keys", [IMAGE, WINDOWS], ids=["beit", "windows"])
def test_nothing_of_the_tokenizer_is_trained_or_saved(keys: dict):
    model = build(keys)
    own = ("encoder.", "predictor.head.", "predictor.mask_token")
    assert all(name.startswith(own) for name in model.state_dict())
    assert all(name.startswith(own) for name, _ in model.named_buffers() if name != "predictor.buckets")
    assert not any("target" in name for name, _ in model.named_modules())
    trained = {p for group in parameter_groups(model, 0.05) for p in group["params"]}
    assert trained == {p for _, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"windows": 2, "window": 5}, "set method.window_size to at most 4"),
        ({"windows": 9, "window": 3}, "fits in only 8 places"),
        ({"mask_ratio": 0.01}, "masks 0 of the image's 24 patches"),
        ({"windows": 1, "window": 2, "mask_ratio": 0.1}, "masks 0 of a window's 4 patches"),
    ],
)
def test_what_does_not_fit_is_refused(keys: dict, says: str):
    with pytest.raises(ValueError, match=says):
        BEiT.Config(**keys).check(GRID, ModelConfig(patch=SIDE))


def random_run(*overrides: str) -> Any:
    keys = ["data.shards=/nowhere", "data.image_size=[64,96]", "model.arch=vit_tiny", "method.tokenizer.codes=32"]
    name = "method.tokenizer.name=random_projection"
    return load("beit_vitb16_224_300e", [*keys, name, *overrides])


def test_a_checkpoint_does_not_continue_with_another_tokenizer():
    before, same, other = (
        TrainState(resume_signature=random_run(f"method.tokenizer.seed={seed}").resume_signature())
        for seed in (1, 1, 2)
    )
    check_continues(before, same)
    with pytest.raises(ValueError, match=r"method\.tokenizer\.sha256 was"):
        check_continues(before, other)


def test_the_resolved_recipe_pins_the_tokenizer(tmp_path: Path):
    config = random_run()
    resolved = tmp_path / "config.yaml"
    resolved.write_text(config.to_yaml())
    assert load(str(resolved), []) == config
    with pytest.raises(ValueError, match=r"not the one of method\.tokenizer\.sha256"):
        load(str(resolved), ["method.tokenizer.seed=9"])


def test_weights_do_not_depend_on_the_tokenizer():
    first, other = (build_method(random_run(f"method.tokenizer.seed={seed}")).state_dict() for seed in (1, 2))
    assert all(torch.equal(first[name], other[name]) for name in first)
