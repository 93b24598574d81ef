"""Tests of encoders with other channels than RGB: their use elsewhere, and conversions to and from RGB encoders."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers.shard_tools import write_tar
from safetensors.torch import load_file, save_file
from timm.models._manipulate import adapt_input_conv

from data.index import load_index
from data.loader import Loader
from data.pixel_format import IMAGENET, Pixels, computable
from downstream.checkpoints.export import export_classifier, export_encoder
from downstream.checkpoints.feature_teachers import read_feature_teacher
from downstream.checkpoints.pixels import match_pixels
from downstream.checkpoints.weights import load_encoder, load_into
from downstream.classify.config import FinetuneConfig
from downstream.classify.finish import save_classifier
from downstream.classify.model import build_classifier
from downstream.classify.trained_classifier import load_classifier
from pretrain.build import build_method
from pretrain.config import PretrainConfig
from pretrain.finish import save_encoder
from pretrain.methods.targets import TeacherConfig
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.features import features, image_features
from pretrain.models.patches import normalize_pixels

KERNEL, BIAS = "patch_embed.proj.weight", "patch_embed.proj.bias"
PIXELS = {
    "gray": Pixels((0.3,), (0.2,)),
    "five": Pixels((0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.06, 0.07, 0.08, 0.09), "uint16"),
}
MODELS = {"relative": {}, "sincos": {"position": "sincos"}}


def keys(pixels: Pixels) -> dict[str, Any]:
    return {"channels": pixels.channels, **pixels._asdict()}


def shards(folder: Path, pixels: Pixels) -> Path:
    """Write a shard of eight arrays in two classes."""
    members = []
    for number in range(8):
        values = np.random.default_rng(number).random((20, 24, pixels.channels)) * pixels.format.white
        name = folder / f"{number}.npy"
        np.save(name, values.astype(pixels.dtype))
        members += [(name.name, name.read_bytes()), (f"{number}.cls", str(number % 2).encode())]
    write_tar(folder / "a.tar", members)
    return folder / "a.tar"


def one_step(model: torch.nn.Module, **inputs: Any) -> None:
    before = model(**inputs)["loss"]
    before.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "pos_embed" not in name)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert norm > 0
    assert model(**inputs)["loss"] < before


@pytest.mark.parametrize("position", MODELS)
@pytest.mark.parametrize("name", PIXELS)
def test_gray_and_multispectral_images_from_pretraining_to_prediction(name: str, position: str, tmp_path: Path):
    pixels, data = PIXELS[name], keys(PIXELS[name])
    method = {"name": "mae", "decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}
    sections: dict[str, Any] = {
        "name": "x",
        "model": {"arch": "vit_tiny", "patch_size": 4, **MODELS[position]},
        "data": {"shards": str(shards(tmp_path, pixels)), "image_size": [12, 16], **data},
    }
    lomar = {"name": "lomar", "window_size": 2}
    config = PretrainConfig.model_validate({**sections, "method": method if position == "sincos" else lomar})
    model = build_method(config)
    index = load_index(config.data.shards)
    loader = Loader(
        index, size=(12, 16), batch=8, seed=0, mask_sampler=model.mask_sampler(), labels=True, format=pixels.format
    )
    ((batch,),) = loader.batches(0, 1)
    images = computable(batch.images)
    one_step(model, images=images, mask_indices=batch.mask_indices)
    encoder = model.encoder.eval()
    save_encoder(encoder.state_dict(), config, tmp_path / "encoder.safetensors", config.train.epochs)

    _, difference, usage = export_encoder(tmp_path / "encoder.safetensors", tmp_path / "timm.safetensors", "timm")
    assert difference < 1e-10
    assert f"in_chans={pixels.channels}" in usage
    assert f"divide the values by {pixels.format.white:g} first" in usage
    exported = _create_from(usage)
    standardized = normalize_pixels(images, pixels).movedim(-1, 1)
    with torch.no_grad():
        torch.testing.assert_close(exported.forward_features(standardized), features(encoder, standardized))
    loaded, _ = load_encoder(tmp_path / "timm.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(image_features(loaded, images), image_features(encoder, images), rtol=0, atol=0)

    start = {"checkpoint": str(tmp_path / "timm.safetensors")}
    sections |= {"start": start, "val": {"shards": "unused"}, "head": {"num_classes": 2}}
    finetuning = FinetuneConfig.model_validate(sections)
    classifier, report = build_classifier(finetuning)
    assert "channels" not in report
    torch.testing.assert_close(classifier.vit.patch_embed.proj.weight, encoder.patch_embed.proj.weight)
    one_step(classifier, images=images, labels=batch.labels)
    save_classifier(classifier.state_dict(), finetuning, ("a", "b"), tmp_path / "model.safetensors")
    trained = load_classifier(tmp_path / "model.safetensors", torch.device("cpu"))
    assert trained.pixels == pixels
    with torch.no_grad():
        torch.testing.assert_close(trained.predict(images), classifier.eval()(images)["logits"])
    assert export_classifier(tmp_path / "model.safetensors", tmp_path / "c.pt", "torchscript")[1] < 1e-4


def _create_from(usage: str) -> torch.nn.Module:
    call = next(line for line in usage.splitlines() if line.startswith("timm.create_model"))
    model: torch.nn.Module = eval(call, {"timm": timm})
    return model.eval()


@pytest.mark.parametrize("position", MODELS)
def test_hub_folder_describes_the_pixels(position: str, tmp_path: Path):
    pixels = PIXELS["five"]
    path = encoder_file(tmp_path, pixels, position)
    assert export_encoder(path, tmp_path / "hub", "hf")[1] < 1e-10
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    if position == "sincos":
        processor = json.loads((tmp_path / "hub" / "preprocessor_config.json").read_text())
        assert config["num_channels"] == 5
        assert processor["image_mean"] == list(pixels.mean)
        assert processor["rescale_factor"] == 1 / 65535
    else:
        assert config["pretrained_cfg"]["input_size"] == [5, 12, 16]
        assert config["pretrained_cfg"]["std"] == list(pixels.std)
    assert "5 channels of uint16, divided by 65535" in (tmp_path / "hub" / "README.md").read_text()


def encoder_file(folder: Path, pixels: Pixels, position: str = "relative") -> Path:
    torch.manual_seed(1)
    spec = EncoderSpec("vit_tiny", 4, (12, 16), position, pixels=pixels)
    encoder = spec.build()
    torch.nn.init.normal_(encoder.patch_embed.proj.bias)
    save_file(encoder.state_dict(), folder / "from.safetensors", spec.to_metadata())
    return folder / "from.safetensors"


@pytest.mark.parametrize(("theirs", "ours"), [("rgb", "gray"), ("rgb", "five"), ("gray", "rgb"), ("five", "rgb")])
def test_other_channels_follow_timm_rule_and_are_reported(theirs: str, ours: str, tmp_path: Path):
    before, after = (PIXELS.get(name, IMAGENET) for name in (theirs, ours))
    path = encoder_file(tmp_path, before)
    kernel = load_file(path)[KERNEL]
    encoder = EncoderSpec("vit_tiny", 4, (12, 16), "relative", pixels=after).build()
    report = load_into(encoder, path)
    found = encoder.patch_embed.proj.weight.detach()
    if theirs == "rgb":
        torch.testing.assert_close(found, adapt_input_conv(after.channels, kernel))
    torch.testing.assert_close(encoder.patch_embed.proj.bias.detach(), load_file(path)[BIAS])
    if "five" not in (theirs, ours):  # five channels do not repeat each color equally often
        torch.testing.assert_close(found.sum(1), kernel.sum(1), msg="gray in all channels stays what it was")
    assert f"{before.channels} -> {after.channels} channels" in str(report)
    assert "timm's rule" in str(report)


@torch.no_grad()
def test_other_mean_and_std_compute_the_same_features(tmp_path: Path):
    ours = Pixels((0.3, 0.5, 0.4), (0.2, 0.1, 0.3))
    path = encoder_file(tmp_path, ours)
    trained, _ = load_encoder(path)
    encoder = EncoderSpec("vit_tiny", 4, (12, 16), "relative").build().eval()
    assert "computes the same from pixels with" in str(load_into(encoder, path))
    images = torch.randint(0, 256, (2, 12, 16, 3), dtype=torch.uint8)
    torch.testing.assert_close(image_features(encoder, images), image_features(trained, images), rtol=0, atol=1e-4)
    assert match_pixels({}, IMAGENET, IMAGENET) == {}


def test_rgb_consumers_reject_other_channels(tmp_path: Path):
    path = encoder_file(tmp_path, PIXELS["five"])
    with pytest.raises(ValueError, match=r"5 channels of uint16, but mm's pipelines give RGB"):
        export_encoder(path, tmp_path / "x.pth", "mm")
    with pytest.raises(
        ValueError, match=r"target.file=.*it expects 5 channels of uint16: give a teacher for 8-bit RGB"
    ):
        read_feature_teacher(TeacherConfig(file=str(path)), (3, 4), 8)
    state = load_file(path)
    save_file(state, path)
    with pytest.raises(ValueError, match="this encoder has square patches of 3 channels"):
        load_encoder(path)
