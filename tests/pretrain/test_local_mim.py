"""Tests for LocalMIM, also on LoMaR's windows. Tests shared with other methods are in test_methods.py."""

from typing import Any

import pytest
import torch
from helpers.reference_local_mim import local_mim_loss
from helpers.tiny import assert_equals_reference, random_images, random_mask_indices, randomize, tiny_method
from torch import Tensor

from pretrain.config import load
from pretrain.methods.lut import LUT, LUTConfig
from pretrain.methods.pr_mim import PRMIMConfig
from pretrain.models.vit import Arch

GRID, PATCH_SIZE, DEEP = (2, 4), 4, Arch(16, 4, 2)
FOUR = {"name": "local_mim", "blocks": [1, 2, 3, 4], "decoder_embed_dim": 8, "decoder_num_heads": 2}
FOUR |= {"target": {"cell_sizes": [1, 2, 4, 8], "bins": 2}}


def build(pr_mim: PRMIMConfig | None = None, **keys: Any) -> Any:
    return tiny_method(FOUR | keys, GRID, PATCH_SIZE, relative=False, pr_mim=pr_mim, arch=DEEP)


def naive_loss(model: Any, images: Tensor, mask_indices: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    blocks, sizes = model.config.blocks, model.target.config.cell_sizes
    return local_mim_loss(images, mask_indices, weights, DEEP.heads, 2, blocks, sizes, bins=2)


def test_four_blocks_and_cell_sizes_equal_the_reference(monkeypatch: pytest.MonkeyPatch):
    assert_equals_reference(build, naive_loss, monkeypatch)


def test_with_pr_mim_each_decoder_computes_its_own_thrown_tokens(monkeypatch: pytest.MonkeyPatch):
    pr_mim = PRMIMConfig(throw_ratio=0.4, kernel_size=3)
    model = build(pr_mim)
    assert random_mask_indices(model)["kept"].shape[1] == 6 - 3
    assert len({decoder.aggregation for decoder in model.predictor.decoders}) == 4
    assert_equals_reference(lambda: build(pr_mim), naive_loss, monkeypatch)


def test_decoders_after_only_some_blocks_equal_the_reference(monkeypatch: pytest.MonkeyPatch):
    keys = {"blocks": [2, 4], "target": {"cell_sizes": [8, 4], "bins": 2}}
    assert_equals_reference(lambda: build(**keys), naive_loss, monkeypatch)


def test_coarse_cells_are_weighted_by_their_share_of_masked_patches():
    """One cell has four masked patches and the other has one, so they make up four fifths and one fifth of the loss."""
    model = build(blocks=[4], target={"cell_sizes": [8], "bins": 2})
    images = random_images(model, 1)
    masked = torch.tensor([[0, 1, 3, 4, 5]])
    indices = {"visible": torch.tensor([[2, 6, 7]]), "masked": masked, "kept": masked}
    truth = model.target.ground_truth(images, images)[0]
    with torch.no_grad():
        model.predictor.decoders[0].pred.weight.zero_()  # predicts zero everywhere
    left, right = (truth[position].square().mean() for position in (0, 2))
    torch.testing.assert_close(model(images, indices)["loss"].detach(), 0.8 * left + 0.2 * right)


def build_windows() -> Any:
    keys = {"name": "lomar", "num_windows": 2, "window_size": 2, "mask_ratio": 0.5, "architecture": "multiscale"}
    keys |= {"blocks": [2, 4], "decoder_depth": 1, "decoder_embed_dim": 8, "decoder_num_heads": 2}
    return tiny_method(keys | {"target": {"name": "hog", "cell_sizes": (2, 4)}}, GRID, PATCH_SIZE, arch=DEEP)


@pytest.mark.parametrize("make", [build, build_windows])
def test_loss_of_each_cell_size_is_logged(make: Any):
    model = make()
    images, indices = random_images(model), random_mask_indices(model)
    views = {name: torch.stack([array, array], 1) for name, array in indices.items()}
    both, lut = torch.stack([images, images], 1), LUT(LUTConfig(hidden_dim=16), model)
    for losses, total in (
        (model(images, indices), "loss"),
        (lut(both, views, lut.teacher_model()(both)), "loss_mim"),
    ):
        by_size = torch.stack([losses[f"loss_cell_{size}"] for size in model.target.config.cell_sizes])
        torch.testing.assert_close(by_size.sum(), losses[total].detach())
        assert [name for name, value in losses.items() if value.requires_grad] == ["loss"]


def test_each_decoder_learns_only_from_its_own_cell_size():
    model = build()
    randomize(model)
    prediction, _ = model._predict(
        torch.randint(0, 256, (2, 8, 48), dtype=torch.uint8), indices := random_mask_indices(model)
    )
    sizes = [scale.num_outputs for scale in model.target.scales]
    assert sizes == [16 * 6, 4 * 6, 6, 6]
    assert prediction.shape == (2, indices["masked"].shape[1], sum(sizes))
    for size, part in enumerate(prediction.split(sizes, dim=-1)):
        model.zero_grad()
        part.sum().backward(retain_graph=True)
        reached = [bool(decoder.embed.weight.grad.any()) for decoder in model.predictor.decoders]
        assert reached == [other == size for other in range(4)]
        assert [bool(block.norm1.weight.grad.any()) for block in model.encoder.blocks] == [n <= size for n in range(4)]


WINDOWS = {"name": "lomar", "num_windows": 2, "window_size": 3, "mask_ratio": 0.6, "architecture": "multiscale"}
WINDOWS |= {"blocks": [1, 2, 4], "decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}
WINDOWS |= {"target": {"name": "hog", "cell_sizes": [1, 2, 4], "bins": 2}}


@pytest.mark.parametrize(
    ("keys", "relative", "pr_mim"),
    [
        ({}, False, None),
        ({}, True, PRMIMConfig(throw_ratio=0.3, kernel_size=3)),
        ({"predict_ratio": 0.4, "window_sampling": "complementary"}, True, None),
    ],
)
def test_lomar_windows_equal_the_reference(
    keys: dict[str, Any], relative: bool, pr_mim: PRMIMConfig | None, monkeypatch: pytest.MonkeyPatch
):
    """Histograms are taken from the whole image, so gradients do not stop at a window's border."""
    assert_equals_reference(
        lambda: tiny_method(WINDOWS | keys, (3, 4), PATCH_SIZE, relative, pr_mim, arch=DEEP), naive_loss, monkeypatch
    )


def test_reconstruct_shows_a_window_and_its_edges():
    model = tiny_method(WINDOWS, (4, 4), PATCH_SIZE, arch=DEEP)
    shown = model.reconstruct(random_images(model), random_mask_indices(model))
    assert list(shown) == ["original", "framed", "window", "masked", "edges", "predicted edges"]
    assert shown["predicted edges"].shape == (2, 12, 12, 3)


RECIPE = "local_mim_vitb16_224_1600e"


def test_recipes_match_the_paper():
    config = load(RECIPE, ["data.shards=none"])
    assert config.method.count_patches(config.grid, 16) == (196, 147)
    partial = load("local_mim_pr_vitb16_224_100e", ["data.shards=none"])
    assert partial.pr_mim.num_kept(196, 147) == 20
    large = load("local_mim_vitl16_224_800e", ["data.shards=none"])
    assert large.method.blocks == (2, 4, 22, 24)
    assert large.target.bins == 18


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.blocks=[2, 4, 6]"], "must ascend from at least 1 to 12"),
        (
            ["method.blocks=null"],
            r"needs a decoder after each of method\.blocks: set, for example, .*blocks=\[2, 4, 12\]",
        ),
        (
            ["method.architecture=asymmetric"],
            r"blocks=\[2, 4, 12\] is only used with method\.architecture=multiscale, not asymmetric",
        ),
        (
            ["method.architecture=simple"],
            r"is only used with method\.architecture=multiscale, not simple: set that, or leave out method\.blocks",
        ),
        (["target.cell_sizes=[4, 8]"], "differ in number: give one size for each block"),
        (["target.cell_sizes=[4, 8, 32]"], r"one of 2, 4, 8, 16 for patches of 16 pixels in windows: .*=\[4, 8, 16\]"),
        (["target.name=pixels"], r"not target\.name=pixels: set target\.name=hog target\.cell_sizes=\[4, 8, 16\]"),
        (["method.mask_token_block=8"], r"architecture=multiscale never does: set method\.mask_token_block=0"),
    ],
)
def test_incompatible_lomar_multiscale_settings_are_rejected(overrides: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        load("lomar_multiscale_vitb16_224_400e", ["data.shards=none", *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["method.blocks=[2, 4, 10, 13]"],
            r"\[2, 4, 10, 13\] must ascend from at least 1 to 12, the last block of vit_base",
        ),
        (["method.blocks=[2, 4, 10, 11]"], r"set, for example, method\.blocks=\[2, 4, 11, 12\]"),
        (["method.blocks=[0, 4, 10, 12]"], r"from at least 1 .* set, for example, method\.blocks=\[1, 4, 10, 12\]"),
        (["method.blocks=[4, 2, 10, 12]"], "must ascend from at least 1"),
        (["model.arch=vit_large"], r"set, for example, method\.blocks=\[2, 4, 22, 24\]"),
        (
            ["method.blocks=[4, 12]"],
            r"target\.cell_sizes=\[4, 8, 16, 32\] differ in number: give one size for each block",
        ),
        (
            ["target.cell_sizes=[4, 8, 16, 48]"],
            r"48\] must each be one of .* set target\.cell_sizes=\[4, 8, 16, 32\]",
        ),
        (["model.patch_size=14"], r"set target\.cell_sizes=\[7, 7, 14, 28\]"),
        (
            ["model.patch_size=14", "method.blocks=[2, 6, 12]", "target.cell_sizes=[2, 7, 14]"],
            r"must each be one of 7, 14, 28 for patches of 14 pixels: set target\.cell_sizes=\[7, 14, 28\]",
        ),
        (["data.image_size=240"], r"the grid of 15x15 patches has an odd side: leave 32 out, or set data\.image_size"),
        (["target.name=pixels"], r"predicts hog, not target\.name=pixels"),
        (["method.mask_ratio=0.999"], "must be masked and one visible"),
        (["method.decoder_num_heads=7"], "is not divisible by method.decoder_num_heads=7"),
        (["lut.alpha=1", "method.mask_ratio=0.4"], "set method.mask_ratio to at least 0.5"),
        (["pr_mim.throw_ratio=0.8"], "set it below 0.75"),
    ],
)
def test_incompatible_settings_are_rejected(overrides: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        load(RECIPE, ["data.shards=none", *overrides])
