"""Tests that `lomar_vit_*` in timm does what downstream code expects of a timm ViT."""

from typing import Any

import pytest
import timm
import torch
from helpers import originals
from helpers.originals import images
from timm.optim import param_groups_layer_decay

from downstream.checkpoints.timm_models import SIZES, model_name
from pretrain.models.relative_position import NUM_BUCKETS, offset_buckets
from pretrain.models.vit import ARCHS, ViT

TINY = {"patch_size": 4, "img_size": 12}


def model(**options: Any) -> Any:
    return originals.randomized(timm.create_model("lomar_vit_tiny_patch16_224", **{**TINY, **options}))


def test_names_are_registered_with_their_sizes():
    for entry in SIZES:
        name = model_name(*entry)
        assert timm.is_model(name)
        assert timm.models.get_pretrained_cfg(name).input_size == (3, entry[2], entry[2])
    with torch.device("meta"):
        base = timm.create_model("lomar_vit_base_patch16_384")
    assert (base.embed_dim, len(base.blocks), base.patch_embed.grid_size) == (768, 12, (24, 24))
    assert base.blocks[3].attn.rpe_k.lookup_table_weight.shape == (1, 64, NUM_BUCKETS)
    assert {arch for arch, *_ in SIZES} == ARCHS.keys()


@torch.no_grad()
def test_other_image_sizes_give_the_same_features():
    fixed, dynamic = model(img_size=(8, 20)), model(dynamic_img_size=True)
    dynamic.load_state_dict(fixed.state_dict())
    encoder = ViT("vit_tiny", 4, (2, 5))
    encoder.load_state_dict(fixed.state_dict())
    pixels = images((8, 20))
    for vit in (fixed, dynamic):
        assert originals.feature_difference(encoder, vit, pixels) < originals.SAME_PARAMETERS
    biased = model(position="bias", dynamic_img_size=True)
    with pytest.raises(ValueError, match=r"tables are for \(3, 3\) patches, but the images have \(2, 5\)"):
        biased(pixels)


def test_unsupported_options_are_rejected():
    with pytest.raises(ValueError, match="position='sincos'"):
        model(position="sincos")
    with pytest.raises(ValueError, match="drop_path_rate"):
        model(attn_drop_rate=0.1)


@pytest.mark.parametrize("position", ["relative", "bias"])
def test_layer_decay_groups(position: str):
    tuned = model(position=position, num_classes=5)
    names = {id(parameter): name for name, parameter in tuned.named_parameters()}
    groups = param_groups_layer_decay(
        tuned, weight_decay=0.05, no_weight_decay_list=tuned.no_weight_decay(), layer_decay=0.5
    )
    scale = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert scale["patch_embed.proj.weight"] == (0.125, 0.05)
    assert scale["cls_token"] == (0.125, 0.0)
    assert scale["head.weight"] == (1.0, 0.05)
    table = {"relative": "rpe_k.lookup_table_weight", "bias": "rpe_bias.relative_position_bias_table"}[position]
    assert scale[f"blocks.0.attn.{table}"] == (0.25, 0.05 if position == "relative" else 0.0)


def test_recomputing_blocks_does_not_change_gradients():
    tuned = model(num_classes=5).train()
    gradients = []
    for enable in (False, True):
        tuned.set_grad_checkpointing(enable)
        assert all(block.recompute == enable for block in tuned.blocks)
        tuned.zero_grad()
        tuned(images()).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in tuned.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


@torch.no_grad()
def test_features_only_and_average_pooling():
    backbone = model(features_only=True, out_indices=[0, 1])
    assert [tuple(level.shape) for level in backbone(images())] == [(2, 16, 3, 3)] * 2
    pooled = model(num_classes=5, global_pool="avg")
    tokens = pooled.forward_features(images())
    expected = pooled.head(pooled.fc_norm(tokens[:, 1:].mean(1)))
    torch.testing.assert_close(pooled(images()), expected)


def test_offset_buckets_match_beit():
    for height, width in ((3, 3), (2, 5), (1, 4)):
        theirs = timm.models.beit.gen_relative_position_index((height, width))
        assert torch.equal(offset_buckets(height, width), theirs)


def test_model_can_be_trained_after_inference_mode():
    tuned = model(img_size=(12, 8), num_classes=5)
    with torch.inference_mode():
        tuned(images((12, 8)))
    tuned(images((12, 8))).sum().backward()
    assert tuned.blocks[0].attn.rpe_k.lookup_table_weight.grad is not None
