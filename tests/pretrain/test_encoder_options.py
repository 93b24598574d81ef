"""Registers, learned positions, a shared relative bias and LayerScale: every method against the naive reference."""

from typing import Any

import pytest
from helpers import reference, reference_mae
from helpers.tiny import TINY, assert_equals_reference, tiny_method
from torch import Tensor

from pretrain.methods.pr_mim import PRMIMConfig

GRID, PATCH_SIZE = (4, 6), 2
DECODER = {"decoder_embed_dim": 12, "decoder_depth": 1, "decoder_num_heads": 3}
MAE = {"name": "mae", **DECODER}
CROSS = {"decoder": "cross", "inter_block_attention": True}
SIMMIM = {"name": "simmim", "mask_patch_size": 4}
LOMAR = {"name": "lomar", "num_windows": 2, "window_size": 3, "mask_ratio": 0.6}
PR_MIM = PRMIMConfig(throw_ratio=0.3, kernel_size=3)
AS_TRAINED = {"shared_bias": True, "layer_scale": 0.1}  # SimMIM

CASES = {
    "mae-registers": (MAE, False, {"registers": 3}, None),
    "mae-learned": (MAE, False, {"learned": True}, None),
    "mae-cross": (MAE | CROSS, False, {"learned": True, "registers": 2}, PR_MIM),
    "mae-both": (MAE | {"encoder_mask_tokens": True}, False, {"learned": True, "registers": 2}, PR_MIM),
    "lomar-registers": (LOMAR, True, {"registers": 2}, None),
    "lomar-late-registers": (LOMAR | {"mask_token_block": 1}, True, {"registers": 2}, PR_MIM),
    "lomar-late-both": (LOMAR | {"mask_token_block": 1}, False, {"learned": True, "registers": 1}, None),
    "lomar-asymmetric": (LOMAR | DECODER | {"architecture": "asymmetric"}, True, {"registers": 2}, None),
    "simmim": (SIMMIM, False, AS_TRAINED, None),
    "simmim-pr_mim-registers": (SIMMIM, False, AS_TRAINED | {"registers": 2}, PR_MIM),
    "simmim-learned": (SIMMIM, False, {"learned": True}, None),
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
