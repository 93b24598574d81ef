"""Pretraining on images with other channel counts and 16 bits: every method takes a step or is rejected clearly."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers.processes import SMALL
from torch import Tensor

from data.pixel_format import IMAGENET, Pixels
from pretrain.build import build_method
from pretrain.config import PretrainConfig
from pretrain.methods import METHODS
from pretrain.methods.targets import PCAConfig, TokensConfig
from pretrain.methods.targets.hog import histograms
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.patches import (
    describe_shown,
    normalize_pixels,
    patchify,
    pixel_target,
    show_patches,
    to_pixels,
    unpatchify,
)
from pretrain.plan.trace import trace_method

MEAN, STD = (0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.06, 0.07, 0.08, 0.09)
FIVE = {"channels": 5, "dtype": "uint16", "mean": MEAN, "std": STD}
MAE = {"name": "mae", "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
LOMAR = {"name": "lomar", "num_windows": 2, "window_size": 3}
SINCOS = {"arch": "vit_tiny", "position": "sincos"}
HOG = {"name": "hog", "cell_sizes": [4, 16], "bins": 4}
LOCAL_MIM = {"name": "local_mim", "blocks": [1, 2], "decoder_embed_dim": 32, "decoder_num_heads": 2}
TOKENS = {"name": "tokens", "tokenizer": "random_projection", "vocab_size": 32}
CASES: dict[str, dict[str, Any]] = {
    "mae": {"method": MAE, "model": SINCOS},
    "mae-pixels": {"method": MAE, "model": SINCOS, "target": {"name": "pixels", "norm_pix": False}},
    "mae-ema": {"method": MAE, "model": SINCOS, "target": {"name": "ema", "blocks": 2}},
    "mae-hog": {"method": MAE, "model": SINCOS, "target": HOG},
    "mff": {"method": MAE | {"name": "mff", "blocks": [1, 2]}, "model": SINCOS},
    "lc_mae": {"method": MAE | {"name": "lc_mae", "proj_dim": 16, "w_in": 0.5}, "model": SINCOS},
    "ae": {"method": MAE | {"name": "ae", "block_size": 24}, "model": SINCOS},
    "simmim": {"method": {"name": "simmim", "mask_patch_size": 16}, "model": SINCOS},
    "beit": {"method": {"name": "beit"}, "target": TOKENS},
    "lomar": {"method": LOMAR},
    "lomar-asymmetric": {"method": LOMAR | {"architecture": "asymmetric", **MAE, "name": "lomar"}},
    "local_mim": {"method": LOCAL_MIM, "model": SINCOS, "target": HOG},
    "lut": {"method": MAE, "model": SINCOS, "lut": {"color_jitter": 0, "three_augment": False, "hidden_dim": 16}},
}
REJECTED = {
    "tec": ({"method": MAE | {"name": "tec"}, "model": SINCOS}, "target.name=teacher needs 8-bit RGB images"),
    "teacher": ({"method": LOMAR, "target": {"name": "teacher"}}, "target.name=teacher needs 8-bit RGB images"),
    "color_jitter": ({"method": LOMAR, "data": {"color_jitter": 0.8}}, "data.color_jitter=0.8 works only on 8-bit RGB"),
    "lut": (
        {"method": MAE, "model": SINCOS, "lut": {"color_jitter": 0.8, "three_augment": True}},
        "lut.color_jitter=0.8 works only on 8-bit RGB(.|\n)*set lut.color_jitter=0(.|\n)*set lut.three_augment=false",
    ),
    "no statistics": ({"method": LOMAR, "data": {"mean": None}}, "needs data.mean of these images: `python -m data.st"),
    "too few": ({"method": LOMAR, "data": {"std": (0.1,) * 3}}, "data.std has 3 values, but data.channels=5"),
    "negative": ({"method": LOMAR, "data": {"std": (0.1, 0.1, 0.1, 0.1, 0)}}, "data.std"),
    "too many channels": ({"method": LOMAR, "data": {"channels": 17}}, "data.channels"),
}


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with SMALL:
        yield


def configure(case: dict[str, Any]) -> PretrainConfig:
    data = {"shards": "unused", "image_size": [64, 80], **FIVE, **case.get("data", {})}
    return PretrainConfig.model_validate({"name": "x", "model": {"arch": "vit_tiny"}, **case, "data": data})


def images(channels: int, white: int, *views: int) -> Tensor:
    """Two images in the format in which they arrive on a device."""
    shape = (2, *views, 64, 80, channels)
    return torch.from_numpy(np.random.default_rng(0).integers(0, white + 1, shape).astype(np.float32))


def masks(method: Any) -> dict[str, Tensor]:
    samples = [method.mask_sampler()(np.random.default_rng(i)) for i in range(2)]
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}


def test_cases_cover_every_method():
    assert {case["method"]["name"] for case in [*CASES.values(), REJECTED["tec"][0]]} == {*METHODS}


@pytest.mark.parametrize("name", CASES)
def test_step_on_five_16_bit_channels_lowers_the_loss(name: str):
    config = configure(CASES[name])
    method = build_method(config)
    pixels, indices = images(5, 65535, *([2] if config.lut else [])), masks(method)
    teacher = {"teacher_features": method.teacher_model()(pixels)} if config.lut else {}
    optimizer = torch.optim.SGD(method.parameters(), lr=1e-3)
    before = method(pixels, indices, **teacher)["loss"]
    before.backward()
    assert method.encoder.patch_embed.proj.weight.shape[1] == 5
    assert (method.encoder.patch_embed.proj.weight.grad.abs().amax((0, 2, 3)) > 0).all(), "all channels are seen"
    optimizer.step()
    after = method(pixels, indices, **teacher)["loss"].item()
    assert math.isfinite(after)
    assert after < before
    if not config.lut:
        shown = method.reconstruct(pixels, indices)
        assert all(image.dtype == torch.uint8 and image.shape[-1] == 3 for image in shown.values())


@pytest.mark.parametrize("name", REJECTED)
def test_rgb_only_settings_and_invalid_statistics_are_rejected(name: str):
    case, reason = REJECTED[name]
    with pytest.raises(ValueError, match=reason):
        configure(case)


def test_pca_and_dalle_targets_need_8_bit_rgb():
    pixels = configure(CASES["mae"]).data.pixels
    with pytest.raises(ValueError, match=r"target.name=pca needs 8-bit RGB images.*set target.name=pixels"):
        PCAConfig.model_construct(name="pca").check_pixels(pixels)
    with pytest.raises(ValueError, match=r"target.name=tokens with target.tokenizer=dalle needs 8-bit RGB images"):
        TokensConfig.model_construct(name="tokens", tokenizer="dalle").check_pixels(pixels)
    TokensConfig.model_construct(name="tokens", tokenizer="dalle").check_pixels(Pixels((0.1,) * 3, (1.0,) * 3))


@pytest.mark.parametrize("pixels", [Pixels(MEAN, STD, "uint16"), Pixels((0.3,), (0.2,)), IMAGENET], ids=str)
def test_pixels_are_standardized_per_channel(pixels: Pixels):
    white = {"uint8": 255, "uint16": 65535}[pixels.dtype]
    values = images(pixels.channels, white)
    exact = (values.double().numpy() / white - np.array(pixels.mean)) / np.array(pixels.std)
    np.testing.assert_allclose(normalize_pixels(values, pixels).numpy(), exact, rtol=1e-4, atol=1e-5)
    patches = patchify(values, 16)
    assert torch.equal(unpatchify(patches, (4, 5), pixels.channels), values)
    target = pixel_target(patches, True, pixels).numpy()
    of_patches = patchify(torch.from_numpy(exact), 16).numpy()
    expected = (of_patches - of_patches.mean(-1, keepdims=True)) / of_patches.std(-1, ddof=1, keepdims=True)
    np.testing.assert_allclose(target, expected, rtol=1e-3, atol=1e-4)


def test_pictures_show_up_to_three_channels():
    five, gray, two = Pixels(MEAN, STD, "uint16"), Pixels((0.3,), (0.2,)), Pixels((0.3, 0.3), (0.2, 0.2))
    patches = patchify(images(5, 65535), 16)
    shown = show_patches(patches, five).unflatten(-1, (-1, 3))
    exact = (patches.unflatten(-1, (-1, 5))[..., :3] / 65535 - torch.tensor(MEAN[:3])) / torch.tensor(STD[:3]) / 4 + 0.5
    assert (shown.float() - (exact * 255).clamp(0, 255)).abs().max() <= 0.51
    assert torch.equal(to_pixels(normalize_pixels(patches, five), five), show_patches(patches, five))
    for pixels in (gray, two):
        bytes_ = images(pixels.channels, 255).byte()
        assert torch.equal(show_patches(bytes_, pixels), bytes_[..., :1].expand(*bytes_.shape[:-1], 3))
        assert torch.equal(to_pixels(normalize_pixels(bytes_, pixels), pixels), show_patches(bytes_, pixels))
    assert describe_shown(five) == (
        "The pictures show channels 1 to 3 of 5 as red, green and blue, with black and white two standard deviations "
        "from the mean."
    )
    assert describe_shown(gray) == "The pictures show the only channel."
    assert describe_shown(IMAGENET) == ""


def test_histograms_treat_channels_independently():
    values = images(5, 65535)
    together = histograms(values, 8, 9)
    for channel in range(5):
        alone = histograms(values[..., channel : channel + 1], 8, 9)
        torch.testing.assert_close(together[..., channel : channel + 1, :], alone, rtol=1e-6, atol=0)


def test_resume_signature_includes_non_default_pixel_formats():
    five = configure(CASES["lomar"])
    others = [{"mean": (0.2, *MEAN[1:])}, {"std": (0.2, *STD[1:])}, {"dtype": "uint8"}]
    signatures = [configure({**CASES["lomar"], "data": keys}).resume_signature() for keys in others]
    assert all(signature != five.resume_signature() for signature in signatures)
    usual = PretrainConfig.model_validate({"name": "x", "method": LOMAR, "data": {"shards": "unused"}})
    assert not usual.resume_signature()["data"].keys() & {"channels", "dtype", "mean", "std"}, "as runs of before"


def test_encoder_spec_records_the_pixel_format():
    five = configure(CASES["lomar"])
    spec = EncoderSpec.of(build_method(five).encoder)
    assert spec.pixels == Pixels(MEAN, STD, "uint16") == five.data.pixels
    assert EncoderSpec.from_metadata(spec.to_metadata()) == spec
    assert EncoderSpec.from_signature(five.resume_signature()).pixels == spec.pixels
    usual = EncoderSpec("vit_tiny", 16, (224, 224), "relative")
    assert not usual.to_metadata().keys() & {"mean", "std", "dtype"}, "as files of before"


def test_planner_accounts_for_channels():
    gray = CASES["lomar"] | {"data": {"channels": 1, "mean": [0.1], "std": [0.1]}}
    five, one = (trace_method(configure(case)) for case in (CASES["lomar"], gray))
    more = 4 * 16**2
    assert five.parameters - one.parameters == more * 32 + more * (32 + 1), "embedded, and predicted"
    assert five.image_bytes == 4 * 64 * 80 * 5, "float32 on the device"
