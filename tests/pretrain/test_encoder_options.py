"""Tests for registers, learned positions, a shared relative bias and LayerScale."""

from typing import Any

import pytest
import torch
from helpers import reference, reference_mae
from helpers.tiny import (
    TINY,
    assert_equals_reference,
    loss_and_gradients,
    random_images,
    random_mask_indices,
    randomize,
    tiny_method,
    tiny_vit,
)
from torch import Tensor

from pretrain.build import build_method
from pretrain.config import PretrainConfig
from pretrain.methods.pr_mim import PRMIMConfig
from pretrain.models.features import features
from pretrain.models.patches import normalize_pixels
from pretrain.numerics import unserved_by_window_kernel
from pretrain.trainer.optim import parameter_groups

GRID, PATCH_SIZE = (4, 6), 2
DECODER = {"decoder_embed_dim": 12, "decoder_depth": 1, "decoder_num_heads": 3}
MAE = {"name": "mae", **DECODER}
CROSS = {"decoder": "cross", "inter_block_attention": True}
SIMMIM = {"name": "simmim", "mask_patch_size": 4}
LOMAR = {"name": "lomar", "num_windows": 2, "window_size": 3, "mask_ratio": 0.6}
PR_MIM = PRMIMConfig(throw_ratio=0.3, kernel_size=3)
AS_TRAINED = {"shared_bias": True, "layer_scale": 0.1}  # as SimMIM's recipes train

CASES = {
    "mae-cross": (MAE | CROSS, False, {"learned": True, "registers": 2}, PR_MIM),
    "mae-both": (MAE | {"encoder_mask_tokens": True}, False, {"learned": True, "registers": 2}, PR_MIM),
    "lomar-late-registers": (LOMAR | {"mask_token_block": 1}, True, {"registers": 2}, PR_MIM),
    "lomar-late-both": (LOMAR | {"mask_token_block": 1}, False, {"learned": True, "registers": 1}, None),
    "lomar-asymmetric": (LOMAR | DECODER | {"architecture": "asymmetric"}, True, {"registers": 2}, None),
    "simmim": (SIMMIM, False, AS_TRAINED, None),
    "simmim-pr_mim-registers": (SIMMIM, False, AS_TRAINED | {"registers": 2}, PR_MIM),
}


def naive_loss(model: Any, images: Tensor, mask_indices: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    config = model.config
    if config.name == "mae":
        error = reference_mae.pixel_error(PATCH_SIZE, norm_pix=True)
        return reference_mae.mae_loss(images, mask_indices, weights, TINY.heads, config.decoder_num_heads, error)
    if config.name == "lomar":
        return reference.lomar_loss(
            images, mask_indices, weights, TINY.heads, True, config.mask_token_block, config.decoder_num_heads
        )
    return reference.simmim_loss(images, mask_indices, weights, TINY.heads)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference_in_float64_and_fp32(case: str, monkeypatch: pytest.MonkeyPatch):
    keys, relative, options, pr_mim = CASES[case]
    assert_equals_reference(
        lambda: tiny_method(keys, GRID, PATCH_SIZE, relative, pr_mim, **options), naive_loss, monkeypatch
    )


METHODS = {
    "lomar": LOMAR,
    "mae": MAE,
    "mae-cross": MAE | {"decoder": "cross"},
    "mae-conv": MAE | {"decoder": "conv"},
    "lc_mae": MAE | {"name": "lc_mae"},
    "ae": MAE | {"name": "ae", "block_size": 4},
    "mff": MAE | {"name": "mff", "blocks": [1, 2]},
    "local_mim": {
        "name": "local_mim",
        "decoder_embed_dim": 16,
        "decoder_num_heads": 2,
        "blocks": [1, 2],
        "target": {"cell_sizes": [4, 2], "bins": 2},
    },
    "simmim": SIMMIM,
    "beit": {"name": "beit", "target": {"name": "tokens", "vocab_size": 8}},
}


@pytest.mark.parametrize("case", METHODS)
def test_every_method_uses_registers_regardless_of_their_order(case: str):
    keys = METHODS[case]
    model = tiny_method(keys, GRID, PATCH_SIZE, keys["name"] in ("lomar", "beit"), registers=2)
    randomize(model)
    images, mask_indices = random_images(model), random_mask_indices(model)
    loss, gradients = loss_and_gradients(model, images, mask_indices)
    assert gradients["encoder.reg_token"].abs().amax(2).all()
    with torch.no_grad():
        model.encoder.reg_token.copy_(model.encoder.reg_token.flip(1))
    swapped, _ = loss_and_gradients(model, images, mask_indices)
    torch.testing.assert_close(swapped, loss)
    shown = model.reconstruct(images, mask_indices)
    assert all(len(image) == len(images) and image.dtype == torch.uint8 for image in shown.values())


@pytest.mark.parametrize("position", ["relative", "sincos", "learned", "bias"])
def test_lut_teacher_sees_all_patches_of_the_image(position: str):
    config = configure(
        {"name": "simmim", "mask_patch_size": 4}, model={"position": position, "registers": 2}, lut={"hidden_dim": 8}
    )
    method = build_method(config)
    randomize(method)
    teacher = method.teacher_model()
    images = random_images(method)
    found = teacher(images.unsqueeze(1).expand(-1, 2, -1, -1, -1).contiguous())
    pixels = normalize_pixels(images).movedim(-1, 1)
    patches = features(method.encoder.eval(), pixels)[:, 3:]
    expected = method.projector.eval()(patches.mean(1))
    torch.testing.assert_close(found[:2, 0], expected)


def test_compiled_blocks_have_the_same_loss_and_gradients():
    keys, relative, options, pr_mim = CASES["simmim-pr_mim-registers"]
    results = []
    for compiled in (False, True):
        model = tiny_method(keys, GRID, PATCH_SIZE, relative, pr_mim, **options)
        randomize(model)
        for block in model.encoder.blocks if compiled else ():
            block.compile(backend="aot_eager", dynamic=False, fullgraph=True)
        results.append(loss_and_gradients(model, random_images(model), random_mask_indices(model)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    ("method", "model", "message"),
    [
        (
            {"name": "mae"},
            {"position": "bias"},
            r"model\.position=bias does not provide: set model\.position=sincos or learned",
        ),
        ({"name": "ae"}, {"position": "relative"}, r"set model\.position=sincos or learned"),
        ({"name": "lomar"}, {"position": "bias"}, r"only the short offsets: set model\.position=relative"),
        ({"name": "lomar"}, {"position": "rope"}, r"model\.position"),
        ({"name": "simmim"}, {"layer_scale": -1}, r"model\.layer_scale"),
    ],
)
def test_unsupported_model_options_are_rejected(method: dict, model: dict, message: str):
    with pytest.raises(ValueError, match=message):
        configure(method, model=model)


def configure(method: dict[str, Any], model: dict[str, Any], **sections: Any) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "name": "x",
            "method": method,
            "model": {"arch": "vit_tiny", "patch_size": 2, **model},
            "data": {"shards": "unused", "image_size": [8, 12]},
            **sections,
        }
    )


def test_window_kernel_supports_up_to_eight_registers():
    few, many = (configure({"name": "lomar", "window_size": 3}, {"registers": registers}) for registers in (8, 9))
    assert unserved_by_window_kernel(few) == ""
    assert "up to 8 registers, not model.registers=9" in unserved_by_window_kernel(many)


def test_learned_positions_and_registers_have_weight_decay():
    encoder = tiny_vit(PATCH_SIZE, GRID, relative=False, learned=True, registers=2, layer_scale=0.1)
    decayed = {id(p) for p in parameter_groups(encoder, 0.05)[0]["params"]}
    assert {id(encoder.pos_embed), id(encoder.reg_token), id(encoder.cls_token)} <= decayed
    assert id(encoder.blocks[0].ls1.gamma) not in decayed
    assert 0.015 < encoder.pos_embed.std() < 0.025
    assert encoder.pos_embed.abs().max() < 2
