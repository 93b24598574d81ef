"""Tests of TEC: naive reference, adapter, export, teachers, and rejected keys."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers.reference_tec import tec_loss
from helpers.tiny import (
    assert_equals_reference,
    random_images,
    random_mask_indices,
    randomize,
    tiny_method,
    tiny_vit,
    train,
)
from torch import Tensor

from pretrain.finish import encoder_state_dict
from pretrain.methods.pr_mim import PRMIMConfig
from pretrain.methods.targets import build_target
from pretrain.methods.targets.features import EncoderTeacher, TeacherConfig
from pretrain.methods.tec import TEC
from pretrain.models.conditional import EncoderAdapter
from pretrain.models.features import features
from pretrain.models.patches import patchify
from pretrain.models.vit import ARCHS, Arch, ViT
from pretrain.trainer.config import ModelConfig

DEEP = Arch(dim=8, depth=6, heads=2)
GRID, PATCH_SIZE = (2, 4), 2
KEYS = {"name": "tec", "decoder_embed_dim": 12, "decoder_depth": 1, "decoder_num_heads": 3, "num_queries": 3}
PR_MIM = PRMIMConfig(throw_ratio=0.3, kernel_size=3)


def build(pr_mim: PRMIMConfig | None = None, **keys: Any) -> Any:
    """A TEC model with a random teacher whose weights are drawn in fp32, so they are the same in every precision."""
    model = tiny_method({**KEYS, **keys, "target": {"name": "teacher"}}, GRID, PATCH_SIZE, False, pr_mim, arch=DEEP)
    teacher = model.target.teacher
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in teacher.encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 0.3)
    return type(model)(model.config, tiny_vit(PATCH_SIZE, GRID, False, arch=DEEP), model.target, pr_mim)


@pytest.mark.parametrize("attention_weight", [0.5, 0.0])
@pytest.mark.parametrize("pr_mim", [None, PR_MIM])
def test_loss_and_gradients_equal_the_reference(
    pr_mim: PRMIMConfig | None, attention_weight: float, monkeypatch: pytest.MonkeyPatch
):
    def naive_loss(model: Any, images: Tensor, mask_indices: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
        teacher = {name: tensor.double() for name, tensor in model.target.teacher.state_dict().items()}
        return tec_loss(
            images,
            mask_indices,
            weights,
            teacher,
            heads=2,
            decoder_heads=3,
            groups=[[0, 1, 2], [3, 4, 5]],
            blocks=2,
            queries=3,
            temperature=1.8,
            attention_weight=attention_weight,
        )

    assert_equals_reference(lambda: build(pr_mim, attention_weight=attention_weight), naive_loss, monkeypatch)


@pytest.mark.parametrize(("depth", "blocks"), [(12, [3] * 4), (32, [4, 4, *[3] * 8]), (2, [2])])
def test_adapter_joins_blocks_in_groups_of_three(depth: int, blocks: list[int]):
    assert EncoderAdapter(4, depth, 8).widths == [4 * count for count in blocks]


@pytest.mark.parametrize("pr_mim", [None, PR_MIM])
def test_overfits_one_batch(pr_mim: PRMIMConfig | None):
    model = build(pr_mim)
    images, mask_indices = random_images(model), random_mask_indices(model)
    assert mask_indices["visible"].shape == (2, 2)
    assert mask_indices["masked"].shape == (2, 6)
    assert mask_indices["kept"].shape == (2, 4 if pr_mim else 6)
    before, losses = model(images, mask_indices), train(model, images, mask_indices, steps=40)
    after = model(images, mask_indices)
    assert losses[-1] < 0.9 * losses[0]
    for term in ("loss_features", "loss_attention"):
        assert after[term] < before[term]


def test_prediction_does_not_depend_on_masked_pixels():
    model = build()
    randomize(model)
    images, mask_indices = random_images(model), random_mask_indices(model)
    shown = model.reconstruct(images, mask_indices)
    assert shown.keys() == {"original", "masked", "features", "predicted features"}
    one, other = (model._predict(patchify(shown[name], PATCH_SIZE), **mask_indices) for name in ("original", "masked"))
    torch.testing.assert_close(one, other)
    from_masked = model.reconstruct(shown["masked"], mask_indices)
    assert (from_masked["features"] != shown["features"]).any(), "the teacher sees the whole image"


def test_exported_encoder_is_a_plain_vit_with_the_same_features():
    model = build()
    randomize(model)
    state = dict(model.state_dict())
    assert not any("teacher" in name for name in state)
    exported = encoder_state_dict(model, state)
    plain = tiny_vit(PATCH_SIZE, GRID, False, arch=DEEP)
    plain.load_state_dict(exported, strict=True)
    images = torch.randn(2, 3, GRID[0] * PATCH_SIZE, GRID[1] * PATCH_SIZE)
    torch.testing.assert_close(features(plain, images), features(model.encoder, images))
    assert not torch.equal(exported["cls_token"], state["encoder.cls_token"])


def test_registers_are_neither_predicted_nor_attention_keys():
    with patch.dict(ARCHS, vit_tiny=DEEP):
        encoder, teacher = (ViT("vit_tiny", PATCH_SIZE, GRID, relative=False, registers=2) for _ in range(2))
    target = build_target(TeacherConfig(), GRID, PATCH_SIZE, EncoderTeacher(teacher))
    model = TEC(TEC.Config(**KEYS), encoder, target)
    images, mask_indices = random_images(model), random_mask_indices(model)
    truth, rows, logits = target.with_attention(images, 3)
    assert truth.shape == (2, 8, DEEP.dim)
    assert logits.shape == (2, DEEP.heads, 4, 8)
    tokens = teacher.blocks[-1].norm1(target.teacher.streams(images, (DEEP.depth - 1,))[0])
    q, k, _ = teacher.blocks[-1].attn.qkv(tokens).view(2, 11, 3, DEEP.heads, -1).permute(2, 0, 3, 1, 4)
    expected = q @ k[:, :, 3:].transpose(2, 3) * q.shape[-1] ** -0.5
    torch.testing.assert_close(logits[:, :, 0], expected[:, :, 0])
    for image in range(2):
        torch.testing.assert_close(logits[image, :, 1:], expected[image][:, 3 + rows[image]])
    features, queries_keys = model._predict(patchify(images, PATCH_SIZE), **mask_indices)
    assert features.shape == (2, 6, DEEP.dim)
    assert queries_keys.shape == (2, 9, 2 * DEEP.dim)


def test_teacher_with_relative_positions_needs_attention_weight_0():
    encoder, teacher = (tiny_vit(PATCH_SIZE, GRID, relative) for relative in (False, True))
    target = build_target(TeacherConfig(), GRID, PATCH_SIZE, EncoderTeacher(teacher))
    with pytest.raises(ValueError, match=r"set method\.attention_weight=0"):
        TEC(TEC.Config(), encoder, target)
    light = TEC(TEC.Config(attention_weight=0), encoder, target)
    assert len(light.decoder.exits) == 1


@pytest.mark.parametrize(
    ("keys", "model", "message"),
    [
        ({}, {"position": "relative"}, "set model.position=sincos"),
        ({"num_queries": 9}, {"position": "sincos"}, "method.num_queries=9, but an image has 8 patches"),
        ({"decoder_num_heads": 5}, {"position": "sincos"}, "is not divisible by method.decoder_num_heads=5"),
        ({"mask_ratio": 0.01}, {"position": "sincos"}, None),
    ],
)
def test_incompatible_keys_are_rejected(keys: dict[str, Any], model: dict[str, Any], message: str | None):
    config = TEC.Config(**{**KEYS, **keys})
    if message is None:
        config.check(GRID, ModelConfig(**model))
        return
    with pytest.raises(ValueError, match=message):
        config.check(GRID, ModelConfig(**model))
