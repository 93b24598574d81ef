"""Tests of MFF: fused blocks, logged fusion weights, rejected keys. test_methods.py has the tests shared by methods."""

from typing import Any

import pytest
import torch
from helpers.reference_mae import mae_loss, pixel_error
from helpers.tiny import assert_equals_reference, random_images, random_mask_indices, tiny_method, train

from pretrain.config import load
from pretrain.models.vit import Arch

DEEP = Arch(16, 4, 2)
MAE = {"name": "mae", "decoder_embed_dim": 12, "decoder_depth": 1, "decoder_num_heads": 3}
MFF = MAE | {"name": "mff", "blocks": [1, 3, 4]}


def build(keys: dict[str, Any] = MFF) -> Any:
    return tiny_method(keys, (2, 4), 2, relative=False, arch=DEEP)


def test_only_the_listed_blocks_are_fused(monkeypatch: pytest.MonkeyPatch):
    def naive_loss(model, images, mask_indices, weights):
        return mae_loss(images, mask_indices, weights, DEEP.heads, 3, pixel_error(2, True), [1, 3, 4])

    assert_equals_reference(build, naive_loss, monkeypatch)


def test_fusion_weights_start_equal_sum_to_one_and_are_learned():
    model = build()
    images, mask_indices = random_images(model), random_mask_indices(model)
    output = model(images, mask_indices)
    assert list(output) == ["loss", "weight_1", "weight_3", "weight_4"]
    assert [output[name].item() for name in list(output)[1:]] == pytest.approx([1 / 3] * 3)
    assert not any(output[name].requires_grad for name in list(output)[1:])
    train(model, images, mask_indices, steps=20)
    shares = [model(images, mask_indices)[f"weight_{block}"].item() for block in (1, 3, 4)]
    assert sum(shares) == pytest.approx(1)
    assert max(shares) - min(shares) > 1e-3


def test_equals_mae_with_all_weight_on_the_last_block():
    mff, mae = build(), build(MAE)
    assert mae.load_state_dict(mff.state_dict(), strict=False).missing_keys == []
    with torch.no_grad():
        mff.fusion.logits.copy_(torch.tensor([-1e9, -1e9, 0.0]))
    images, mask_indices = random_images(mff), random_mask_indices(mff)
    torch.testing.assert_close(mff(images, mask_indices)["loss"], mae(images, mask_indices)["loss"])


def test_encoder_state_has_no_fusion_parameters():
    model = build()
    assert {name for name, _ in model.named_parameters() if "fusion" in name} == {
        "fusion.logits",
        *(f"fusion.projections.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")),
    }
    assert not any("fusion" in name for name in model.encoder.state_dict())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.blocks=[1, 3, 13]"], "must ascend from at least 1 to 12, the last block of vit_base"),
        (["method.blocks=[1, 3, 5]"], r"set, for example, method\.blocks=\[1, 10, 12\]"),
        (["method.blocks=[12]"], "method.blocks"),
        (["method.decoder=cross", "method.inter_block_attention=true"], "set method.inter_block_attention=false"),
        (["model.position=relative"], "set model.position=sincos"),
    ],
)
def test_incompatible_keys_are_rejected(overrides: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        load("mff_vitb16_224_800e", ["data.shards=none", *overrides])
