"""Tests for features of a frozen teacher, or of the encoder's moving average, as targets."""

import re
from typing import Any

import pytest
import torch
from helpers import reference_mae
from helpers.reference_features import ema_target, teacher_target
from helpers.tiny import (
    TINY,
    assert_equals_reference,
    random_images,
    random_mask_indices,
    tiny_method,
    tiny_vit,
    train,
)
from torch import Tensor

from pretrain.build import build_ema, build_method, feature_teacher
from pretrain.config import PretrainConfig
from pretrain.methods.lomar import LoMaR
from pretrain.methods.targets.features import (
    EncoderTeacher,
    FeatureTarget,
    TeacherConfig,
    standardize_over_patches,
)
from pretrain.models.vit import ARCHS, Arch, ViT
from pretrain.plan.trace import trace_method

GRID, PATCH_SIZE = (4, 6), 2
MAE = {"name": "mae", "decoder_embed_dim": 12, "decoder_depth": 1, "decoder_num_heads": 3}
TINY_MODEL = {"arch": "vit_tiny", "position": "sincos"}
TARGETS: dict[str, dict[str, Any]] = {
    "teacher": {"name": "teacher", "blocks": 2},
    "ema": {"name": "ema", "blocks": 2},
}


def build(keys: dict[str, Any], relative: bool = False) -> Any:
    """A method with random teacher weights, the same fp32 values whatever the default dtype."""
    model = tiny_method(keys, GRID, PATCH_SIZE, relative)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.target.teacher.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 0.3)
    return model


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("relative", [False, True])
def test_target_matches_a_naive_loop(name: str, relative: bool):
    model = build({"name": "simmim", "mask_patch_size": 4, "target": TARGETS[name]}, relative)
    images = random_images(model)
    truth = model.target.ground_truth(images, images)
    naive = {"teacher": teacher_target, "ema": ema_target}[name]
    weights = {key: tensor.double() for key, tensor in model.target.teacher.state_dict().items()}
    expected = torch.stack([torch.stack(naive(image, weights, TINY.heads, 2)) for image in images])
    assert truth.dtype == torch.float32
    assert not truth.requires_grad
    torch.testing.assert_close(truth.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TARGETS)
def test_loss_and_gradients_equal_the_reference_in_float64_and_fp32(name: str, monkeypatch: pytest.MonkeyPatch):
    naive = {"teacher": teacher_target, "ema": ema_target}[name]

    def naive_loss(model: Any, images: Tensor, mask_indices: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
        teacher = {key: tensor.double() for key, tensor in model.target.teacher.state_dict().items()}
        targets = {image.numpy().tobytes(): naive(image, teacher, TINY.heads, 2) for image in images}

        def error(prediction: Tensor, image: Tensor, position: int) -> Tensor:
            return ((prediction - targets[image.numpy().tobytes()][position]) ** 2).sum() / len(prediction)

        return reference_mae.mae_loss(images, mask_indices, weights, TINY.heads, 3, error)

    assert_equals_reference(lambda: build(MAE | {"target": TARGETS[name]}), naive_loss, monkeypatch)


def test_features_are_standardized_per_image_and_channel():
    found = standardize_over_patches(torch.randn(3, 50, 7).bfloat16() * 5 + 2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.mean(1), torch.zeros(3, 7), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.var(1), torch.ones(3, 7), atol=1e-5, rtol=0)
    assert not standardize_over_patches(torch.full((1, 4, 2), 3.0)).any(), "a constant channel has no direction"


def configure(**sections: Any) -> PretrainConfig:
    defaults = {"name": "x", "data": {"shards": "unused", "image_size": 32}, "model": {"position": "sincos"}}
    method = {"method": {"name": "mae", "decoder_depth": 1, "decoder_embed_dim": 32, "decoder_num_heads": 2}}
    return PretrainConfig.model_validate({**defaults, **method, **sections})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"target": {"name": "ema", "blocks": 13}},
            "target.blocks=13, but model.arch=vit_base has 12 blocks: set target.blocks to at most 12",
        ),
        (
            {"target": {"name": "ema"}, "lut": {"alpha": 1.0}},
            "lut and target.name=ema both learn from a moving average of the encoder: leave one of them out",
        ),
        ({"target": {"name": "ema"}, "method": {"name": "ae", "block_size": 16}}, "method ae predicts pixels"),
    ],
)
def test_incompatible_settings_are_rejected(sections: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        configure(**sections)


def test_moving_average_starts_as_the_encoder_and_follows_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(ARCHS, "vit_tiny", TINY)
    config = configure(target={"name": "ema", "blocks": 1, "momentum": 0.5, "final_momentum": 0.5}, model=TINY_MODEL)
    method = build_method(config)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(1)  # as loading initial weights does
    ema = build_ema(config, method, torch.device("cpu"))
    teacher = feature_teacher(method)
    assert ema.model is teacher
    assert isinstance(teacher, EncoderTeacher)
    assert not any(name.startswith("target") or "teacher" in name for name in method.state_dict())
    before = method.target.ground_truth(images := random_images(method), images)
    torch.testing.assert_close(teacher.encoder.state_dict(), dict(method.encoder.state_dict()))
    with torch.no_grad():
        method.encoder.cls_token.add_(2)
    ema.update(0.3)
    torch.testing.assert_close(teacher.encoder.cls_token, method.encoder.cls_token - 1)
    assert not torch.equal(method.target.ground_truth(images, images), before)


def test_planner_counts_frozen_and_averaged_teachers():
    frozen, averaged = (
        trace_method(configure(target={"name": name}, model={"arch": "vit_small", "position": "sincos"}))
        for name in ("teacher", "ema")
    )
    weights = sum(p.numel() for p in ViT("vit_small", 16, (2, 2), relative=False).parameters())
    assert (frozen.frozen, frozen.averaged) == (weights, 0)
    assert (averaged.frozen, averaged.averaged) == (0, weights)
    for trace in (frozen, averaged):
        calls = [(call.sequences, call.tokens, call.blocks) for call in trace.calls if not call.backward]
        assert calls == [(1, 5, 12)], "one pass of the whole image, without a backward pass"


def test_teacher_may_differ_in_architecture_and_position_embedding():
    torch.manual_seed(0)
    teacher = EncoderTeacher(tiny_vit(PATCH_SIZE, GRID, relative=False, arch=Arch(24, 3, 3)))
    target = FeatureTarget(TeacherConfig(), PATCH_SIZE, teacher)
    model = LoMaR(LoMaR.Config(num_windows=2, window_size=3), tiny_vit(PATCH_SIZE, GRID), target)
    losses = train(model, random_images(model), random_mask_indices(model), steps=60)
    assert target.last == (2, 3)
    assert losses[-1] < 0.8 * losses[0]


def test_windows_of_an_image_share_one_teacher_pass(monkeypatch: pytest.MonkeyPatch):
    model = build({"name": "lomar", "num_windows": 3, "window_size": 3, "target": TARGETS["ema"]}, relative=True)
    batch_sizes = []
    forward = type(model.target.teacher).forward
    monkeypatch.setattr(
        type(model.target.teacher), "forward", lambda *args: batch_sizes.append(len(args[1])) or forward(*args)
    )
    model(random_images(model), random_mask_indices(model))
    assert batch_sizes == [2]
