"""Tests for LoMaR: comparison with the naive reference, and what predictions and losses depend on."""

import pytest
import torch
from helpers import reference, reference_cross
from helpers.tiny import (
    TINY,
    assert_equals_reference,
    loss_and_gradients,
    random_images,
    random_mask_indices,
    randomize,
    tiny_lomar,
    tiny_method,
    train,
)
from torch import Tensor

from pretrain.config import load
from pretrain.methods.lomar import LoMaR
from pretrain.methods.pr_mim import PRMIMConfig
from pretrain.models.patches import ALONE, cut_windows, gather_tokens, normalize_patches, normalize_pixels, patchify
from pretrain.trainer.optim import parameter_groups

ASYMMETRIC = {"architecture": "asymmetric", "decoder_embed_dim": 12, "decoder_depth": 2, "decoder_num_heads": 3}
CROSS = ASYMMETRIC | {"decoder": "cross"}
INTER_BLOCK = CROSS | {"inter_block_attention": True}
PIXELS = {"target": {"norm_pix": False}}
CASES = [
    pytest.param({}, id="relative-norm_pix"),
    pytest.param(PIXELS, id="relative-pixels"),
    pytest.param({"relative": False}, id="absolute"),
    # 5x5 windows overlap on this grid, and use buckets that several offsets share (2 and 3; 4 and more).
    pytest.param({"window_size": 5, "num_windows": 2, "grid": (5, 7), "mask_ratio": 0.8}, id="wide"),
    pytest.param({"mask_token_block": 1}, id="late"),
    pytest.param({"mask_token_block": 1, "relative": False}, id="late-absolute"),
    pytest.param(ASYMMETRIC, id="asymmetric"),
    pytest.param(ASYMMETRIC | {"relative": False}, id="asymmetric-absolute"),
    pytest.param(ASYMMETRIC | {"pr_mim": PRMIMConfig(throw_ratio=0.3, kernel_size=3)}, id="asymmetric-pr_mim"),
    pytest.param(CROSS | {"relative": False, "predict_ratio": 0.25}, id="cross-absolute-part"),
    pytest.param(INTER_BLOCK | {"pr_mim": PRMIMConfig(throw_ratio=0.3, kernel_size=3)}, id="cross-inter_block-pr_mim"),
    pytest.param({"pr_mim": PRMIMConfig(throw_ratio=0.4, kernel_size=3)}, id="pr_mim"),
    pytest.param({"pr_mim": PRMIMConfig(throw_ratio=0.4, kernel_size=5), "relative": False}, id="pr_mim-absolute"),
    pytest.param(
        {"pr_mim": PRMIMConfig(throw_ratio=0.3, kernel_size=3, sampling="random"), "mask_token_block": 1},
        id="pr_mim-late",
    ),
]


def naive_loss(model: LoMaR, images: Tensor, mask_indices: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    c = model.config
    if c.decoder == "cross":
        return reference_cross.lomar_loss(images, mask_indices, weights, TINY.heads, c.decoder_num_heads)
    keys = (model.target.norm_pix, c.mask_token_block, c.decoder_num_heads)
    return reference.lomar_loss(images, mask_indices, weights, TINY.heads, *keys)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference_in_float64_and_fp32(case: dict, monkeypatch: pytest.MonkeyPatch):
    assert_equals_reference(lambda: tiny_lomar(**case), naive_loss, monkeypatch)


def predictions(model: LoMaR, images: Tensor, mask_indices: dict[str, Tensor]) -> Tensor:
    """Predictions of all masked patches, (B, W, M, P)."""
    with torch.no_grad():
        patches = patchify(images, model.encoder.patch_size)
        prediction, _ = model._predict(*cut_windows(patches, mask_indices))
        return prediction.view(*mask_indices["masked"].shape, -1)


def change_patch(model: LoMaR, images: Tensor, image: int, row: int, col: int) -> Tensor:
    """A copy with one byte of one patch changed."""
    changed = images.clone()
    changed[image, row * model.encoder.patch_size, col * model.encoder.patch_size, 1] ^= 128
    return changed


@pytest.mark.parametrize(
    "case", [{}, {"relative": False}, ASYMMETRIC, CROSS], ids=["relative", "absolute", "asymmetric", "cross"]
)
def test_prediction_depends_only_on_visible_pixels_of_its_own_window(case: dict):
    model = tiny_lomar(**case)
    randomize(model)
    images, mask_indices = random_images(model), random_mask_indices(model)
    before = predictions(model, images, mask_indices)
    rows, cols = model.encoder.grid
    num_checked = {True: 0, False: 0}
    for image in range(len(images)):
        for patch in range(rows * cols):
            after = predictions(model, change_patch(model, images, image, *divmod(patch, cols)), mask_indices)
            for b in range(len(images)):
                for w in range(model.config.num_windows):
                    visible = mask_indices["positions"][b, w][mask_indices["visible"][b, w]].tolist()
                    expected = b == image and patch in visible
                    num_checked[expected] += 1
                    # Every masked token of the window sees the change, or none does.
                    changed = (after[b, w] != before[b, w]).any(-1)
                    assert changed.all() if expected else not changed.any(), (image, patch, b, w)
    assert num_checked[True] == mask_indices["visible"].numel()


def test_target_depends_only_on_masked_patches():
    model = tiny_lomar(**PIXELS)
    randomize(model)
    with torch.no_grad():
        model.encoder.patch_embed.proj.weight.zero_()  # now pixels affect the loss only through the target
    images, mask_indices = random_images(model), random_mask_indices(model)
    before = model(images, mask_indices)["loss"]
    rows, cols = model.encoder.grid
    masked = mask_indices["positions"].gather(2, mask_indices["masked"])
    outcomes = set()
    for patch in range(rows * cols):
        after = model(change_patch(model, images, 0, *divmod(patch, cols)), mask_indices)["loss"]
        is_target = bool((masked[0] == patch).any())
        outcomes.add(is_target)
        assert (after != before) == is_target, patch
    assert outcomes == {True, False}


def test_loss_does_not_depend_on_the_order_of_windows_and_images():
    model = tiny_lomar()
    randomize(model)
    images, mask_indices = random_images(model, 3), random_mask_indices(model, 3)
    loss = model(images, mask_indices)["loss"]
    flipped = {name: index.flip(0, 1) for name, index in mask_indices.items()}
    torch.testing.assert_close(model(images.flip(0), flipped)["loss"], loss, rtol=1e-6, atol=0)
    mismatched = {name: index.flip(0) for name, index in mask_indices.items()}
    assert (model(images, mismatched)["loss"] - loss).abs() > 1e-4


@pytest.mark.parametrize("relative", [True, False])
def test_every_parameter_has_an_initial_gradient_and_one_optimizer_group(relative: bool):
    model = tiny_lomar(relative=relative)
    _, gradients = loss_and_gradients(model, random_images(model), random_mask_indices(model))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad, name
        assert gradients[name].isfinite().all(), name
        assert gradients[name].any(), name

    names = {id(p): name for name, p in model.named_parameters()}
    decay = {}
    for group in parameter_groups(model, 0.05):
        for parameter in group["params"]:
            assert names[id(parameter)] not in decay, "in two groups"
            decay[names[id(parameter)]] = group["weight_decay"]
    assert decay.keys() == set(names.values())
    assert (
        decay["predictor.mask_token"] == decay["encoder.cls_token"] == decay["encoder.patch_embed.proj.weight"] == 0.05
    )
    for name, value in decay.items():
        vector = name.endswith(".bias") or ("norm" in name and name.endswith(".weight"))
        assert value == (0.0 if vector else 0.05), name


def test_exactly_the_buckets_within_a_window_have_gradients():
    model = tiny_lomar()
    randomize(model)
    _, gradients = loss_and_gradients(model, random_images(model), random_mask_indices(model))
    offsets = range(-2, 3)
    used = {reference.bucket((dy, dx), (0, 0)) for dy in offsets for dx in offsets} | {reference.CLASS_BUCKET}
    table = gradients["encoder.blocks.0.attn.rpe_k.lookup_table_weight"]
    assert table.shape == (1, TINY.dim // TINY.heads, 50)
    assert set(table[0].any(0).nonzero().flatten().tolist()) == used


def test_activation_checkpointing_gives_bitwise_identical_gradients():
    plain, recomputing = tiny_lomar(), tiny_lomar(grad_checkpointing=True)
    randomize(plain)
    recomputing.load_state_dict(plain.state_dict())
    images, mask_indices = random_images(plain), random_mask_indices(plain)
    calls = []
    recomputing.encoder.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    loss, gradients = loss_and_gradients(plain, images, mask_indices)
    same_loss, same_gradients = loss_and_gradients(recomputing, images, mask_indices)
    assert len(calls) == 2, "the block runs again in the backward pass"
    assert torch.equal(loss, same_loss)
    assert all(torch.equal(gradients[name], same_gradients[name]) for name in gradients)


def test_bf16_autocast_is_close_to_fp32_with_an_fp32_loss():
    model = tiny_lomar(arch=TINY._replace(dim=32))
    images, mask_indices = random_images(model, 4), random_mask_indices(model, 4)
    loss, gradients = loss_and_gradients(model, images, mask_indices)
    with torch.autocast("cpu", torch.bfloat16):
        rounded_loss, rounded = loss_and_gradients(model, images, mask_indices)
    assert rounded_loss.dtype == torch.float32
    assert rounded_loss != loss, "autocast did nothing"
    torch.testing.assert_close(rounded_loss, loss, rtol=5e-3, atol=0)
    for name, gradient in gradients.items():
        assert torch.cosine_similarity(rounded[name].flatten(), gradient.flatten(), dim=0) > 0.99, name


@pytest.mark.parametrize("case", [{}, ASYMMETRIC], ids=["simple", "asymmetric"])
def test_overfits_one_batch(case: dict):
    model = tiny_lomar(patch_size=4, arch=TINY._replace(dim=64), **case)
    losses = train(model, random_images(model), random_mask_indices(model))
    assert losses[0] > 0.9, "normalized targets have variance one"
    assert losses[-1] < 0.25 * losses[0]


@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstruct_shows_the_visible_patches_and_the_predictions(norm_pix: bool, monkeypatch: pytest.MonkeyPatch):
    model = tiny_lomar(patch_size=4, target={"norm_pix": norm_pix})
    images, mask_indices = random_images(model), random_mask_indices(model)
    honest = model.reconstruct(images, mask_indices)

    def predict_the_truth(patches: Tensor, index: dict[str, Tensor]) -> tuple[Tensor, None]:
        target = normalize_pixels(gather_tokens(patches, index["masked"]))
        return normalize_patches(target) if norm_pix else target, None

    monkeypatch.setattr(model, "_predict", predict_the_truth)
    perfect = model.reconstruct(images, mask_indices)
    assert torch.equal(perfect["original"], images)
    assert all(image.dtype == torch.uint8 for image in honest.values())
    side, size, columns = model.encoder.patch_size, model.config.window_size, model.encoder.grid[1]
    for b in range(len(images)):
        top, left = divmod(mask_indices["positions"][b, 0, 0].item(), columns)
        cut = images[b, top * side : (top + size) * side, left * side : (left + size) * side]
        assert torch.equal(perfect["window"][b], cut)
        assert torch.equal(perfect["reconstruction"][b], cut), "undoing the normalization gives the pixels back"
        for i in range(size * size):
            row, col = (n * side for n in divmod(i, size))
            at = (b, slice(row, row + side), slice(col, col + side))
            is_masked = i in mask_indices["masked"][b, 0]
            assert (
                (perfect["masked"][at] == 128).all() if is_masked else torch.equal(perfect["masked"][at], cut[at[1:]])
            )
            assert torch.equal(honest["reconstruction"][at], cut[at[1:]]) != is_masked
            assert (honest[ALONE][at] == 255).all() != is_masked
            if not norm_pix and is_masked:
                assert torch.equal(honest[ALONE][at], honest["reconstruction"][at])
        changed = (perfect["framed"][b] != images[b]).any(-1)
        inside = torch.zeros_like(changed)
        inside[top * side + 1 : (top + size) * side - 1, left * side + 1 : (left + size) * side - 1] = True
        outside = torch.ones_like(changed)
        outside[top * side : (top + size) * side, left * side : (left + size) * side] = False
        assert not changed[inside | outside].any(), "a frame of one pixel"
        assert changed.any()


@pytest.mark.parametrize("case", CASES)
def test_predicting_some_images_still_returns_the_visible_tokens_of_all(case: dict):
    model = tiny_lomar(**case)
    randomize(model)
    images, mask_indices = random_images(model, 3), random_mask_indices(model, 3)
    some = model.compute_loss(images, mask_indices, num_predicted=2)
    whole = model.compute_loss(images, mask_indices)
    first = {name: index[:2] for name, index in mask_indices.items()}
    torch.testing.assert_close(some.losses, model(images[:2], first))
    torch.testing.assert_close(some.visible_tokens, whole.visible_tokens)
    assert torch.equal(some.positions, mask_indices["positions"].gather(2, mask_indices["visible"]).flatten(1))
    assert some.visible_tokens.shape == (3, mask_indices["visible"][0].numel(), TINY.dim)


def test_late_mask_tokens_need_the_simple_architecture():
    keys = ["data.shards=/x", "method.architecture=asymmetric"]
    with pytest.raises(ValueError, match=r"method\.architecture=asymmetric never does: set method\.mask_token_block=0"):
        load("lomar_late_vitb16_224_400e", keys)
    assert load("lomar_pr_vitb16_224_400e", keys).pr_mim is not None
    with pytest.raises(ValueError, match=r"is not divisible by method\.decoder_num_heads=7"):
        load("lomar_vitb16_224_400e", [*keys, "method.decoder_num_heads=7"])


def test_decoder_options_need_the_asymmetric_architecture():
    for key in ("method.decoder=cross", "method.predict_ratio=0.25"):
        with pytest.raises(ValueError, match=f"{key} .*set method.architecture=asymmetric"):
            load("lomar_vitb16_224_400e", ["data.shards=/x", key])
    with pytest.raises(
        ValueError, match=r"pr_mim predicts all .* method\.predict_ratio=0\.25 .* leave one of them out"
    ):
        load("lomar_cross_vitb16_224_400e", ["data.shards=/x", "method.predict_ratio=0.25", "pr_mim.throw_ratio=0.5"])


def test_asymmetric_window_covering_the_image_equals_mae():
    """The rightmost point in the paper's Fig. 5 (a window of 14x14 patches), here with 4x4 patches."""
    lomar = tiny_lomar(grid=(4, 4), num_windows=1, window_size=4, mask_ratio=0.75, relative=False, **ASYMMETRIC)
    randomize(lomar)
    keys = {name: value for name, value in ASYMMETRIC.items() if name != "architecture"}
    mae = tiny_method({"name": "mae", **keys}, (4, 4), 2, relative=False)
    mae.load_state_dict({name.removeprefix("predictor."): value for name, value in lomar.state_dict().items()})
    images, mask_indices = random_images(lomar), random_mask_indices(lomar)
    loss = mae(images, {name: index[:, 0] for name, index in mask_indices.items() if name != "positions"})["loss"]
    torch.testing.assert_close(lomar(images, mask_indices)["loss"], loss)
