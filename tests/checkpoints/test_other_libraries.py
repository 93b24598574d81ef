"""Tests of weights named as in transformers, mmpretrain, I-JEPA and MoCo v3: same features, or a clear error."""

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from helpers import originals
from helpers.originals import SAME_TO_FP32, feature_difference, images
from helpers.other_libraries import OTHERS, TRANSFORMERS, ijepa, moco_v3, transformers_model
from safetensors.torch import load_file, save_file

from downstream.checkpoints.export import export_encoder
from downstream.checkpoints.files import read_source
from downstream.checkpoints.weights import features, load_encoder, load_into
from pretrain.models.vit import ARCHS, ViT


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_models_are_read_from_their_folders(name: str, tmp_path: Path):
    path, model = transformers_model(tmp_path, name, **TRANSFORMERS[name])
    encoder, report = load_encoder(path)
    assert feature_difference(encoder, model, images()) < SAME_TO_FP32
    assert "under transformers' names" in str(report)
    used = {key for keys in report.used.values() for key in keys}
    assert used | report.dropped.keys() == read_source(path).tensors.keys()
    from_file, _ = load_encoder(path / "model.safetensors")
    assert feature_difference(from_file, model, images()) < SAME_TO_FP32


def test_module_names_of_transformers_are_recognized(tmp_path: Path):
    """Since transformers 5, module names differ from those in its files."""
    _, model = transformers_model(tmp_path, "ViTModel", image_size=12)
    torch.save(model.model.state_dict(), tmp_path / "state.pth")
    assert any("layers.0.attention.q_proj" in name for name in model.model.state_dict())
    encoder, report = load_encoder(tmp_path / "state.pth")
    model.half = False  # no file next to the weights specifies the pixels
    assert feature_difference(encoder, model, images()) < SAME_TO_FP32
    assert "assumed" in report.pixels


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_sharded_weights_are_joined(kind: str, tmp_path: Path):
    path, model = transformers_model(tmp_path, "ViTModel")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    stem = "model" if kind == "safetensors" else "pytorch_model"
    files = {name: f"{stem}-0000{1 + number % 2}-of-00002.{kind}" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        save_file(part, path / file) if kind == "safetensors" else torch.save(part, path / file)
    index = path / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for given in (path, index, path / file):
        assert feature_difference(load_encoder(given)[0], model, images()) < SAME_TO_FP32
    index.write_text(json.dumps({"weight_map": {**files, "cls_token": "../elsewhere.bin"}}))
    with pytest.raises(ValueError, match=r"names \.\./elsewhere\.bin, which is not in the folder"):
        load_encoder(path)
    index.unlink()
    with pytest.raises(ValueError, match=r"none of model\.safetensors"):
        load_encoder(path)


def test_unsupported_settings_in_the_config_are_rejected(tmp_path: Path):
    path, _ = transformers_model(tmp_path, "ViTModel", num_attention_heads=4, hidden_act="relu")
    with pytest.raises(ValueError, match=r"num_attention_heads=4 \(here: 2\), hidden_act=relu"):
        load_encoder(path)
    (path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json is not a JSON object"):
        load_encoder(path)


def test_non_square_image_size_is_read_from_the_config(tmp_path: Path):
    path, _ = transformers_model(tmp_path, "ViTModel", image_size=[8, 20])
    assert load_encoder(path)[0].grid == (2, 5)


def test_exported_hub_folders_can_be_loaded(tmp_path: Path):
    for source in ("mae", "lomar"):
        path, model = originals.ORIGINALS[source](tmp_path)
        export_encoder(path, tmp_path / "hub", "hf")
        encoder, _ = load_encoder(tmp_path / "hub")
        assert feature_difference(encoder, model, images()) < SAME_TO_FP32
        shutil.rmtree(tmp_path / "hub")


@pytest.mark.parametrize("name", OTHERS)
def test_features_match_the_original(name: str, tmp_path: Path):
    path, model = OTHERS[name](tmp_path)
    encoder, report = load_encoder(path)
    assert feature_difference(encoder, model, images()) < SAME_TO_FP32
    used = {key for keys in report.used.values() for key in keys}
    assert used | report.dropped.keys() == read_source(path).tensors.keys()
    assert ("mmpretrain" in str(report)) == ("mmpretrain" in name)


@pytest.mark.parametrize("make", [ijepa, moco_v3])
def test_one_of_several_encoders_is_chosen_by_name(make: type, tmp_path: Path):
    names = {"ijepa": ("encoder", "target_encoder"), "moco_v3": ("base_encoder", "momentum_encoder")}[make.__name__]
    for weights in ("online", "ema", *names):
        path, model = make(tmp_path, weights)
        encoder, report = load_encoder(path, weights=weights)
        assert feature_difference(encoder, model, images()) < SAME_TO_FP32
        assert report.weights == ("online" if weights in ("online", names[0]) else "ema")
    with pytest.raises(ValueError, match=f"no student weights, only {', '.join(names)}"):
        load_encoder(path, weights="student")


def test_encoder_without_class_token_loads_into_one_with_it(tmp_path: Path):
    path, _ = ijepa(tmp_path)
    encoder = ViT("vit_tiny", originals.PATCH, (3, 3), relative=False)
    fresh = encoder.cls_token.clone()
    report = load_into(encoder, path)
    assert torch.equal(encoder.cls_token, fresh)
    assert "stays as initialized" in report.resized["cls_token"]
    assert torch.equal(encoder.norm.weight, load_encoder(path)[0].norm.weight)
    assert load_encoder(path, image_size=20)[1].resized.keys() == {"pos_embed"}


def test_moco_v3_vit_small_is_rejected_for_its_number_of_heads(tmp_path: Path):
    path, _ = moco_v3(tmp_path)
    with (
        patch.dict(ARCHS, vit_small=ARCHS["vit_tiny"], clear=True),
        pytest.raises(ValueError, match="MoCo v3's ViT-S has 12 heads"),
    ):
        load_encoder(path)


@torch.no_grad()
@pytest.mark.parametrize(
    ("statistics", "mean"), [({"image_mean": 0.5, "image_std": 0.5}, 0.5), ({"do_normalize": False}, 0.0)]
)
def test_pixel_normalization_is_read_from_the_preprocessor(statistics: dict, mean: float, tmp_path: Path):
    path, model = transformers_model(tmp_path, "ViTModel")
    (path / "preprocessor_config.json").write_text(json.dumps(statistics))
    encoder, report = load_encoder(path)
    pixels = originals.half_pixels(images())  # normalized with mean and std 0.5, or from 0 to 1
    expected = model.model(pixels if mean else pixels / 2 + 0.5).last_hidden_state
    assert f"mean {mean:g}" in report.pixels
    torch.testing.assert_close(features(encoder, images()), expected, atol=1e-4, rtol=1e-4)


def test_other_modules_are_recognized_under_a_common_prefix(tmp_path: Path):
    """Lightning's files have such a prefix."""
    state = originals.prefixed("model.encoder.", originals.vit().state_dict())
    torch.save({"state_dict": {**state, "model.decoder.0.weight": originals.noise(3)}}, tmp_path / "a.ckpt")
    assert load_encoder(tmp_path / "a.ckpt")[1].dropped == {"model.decoder.0.weight": "the pretraining decoder"}


def test_error_for_a_remote_name_explains_how_to_download_it():
    with pytest.raises(ValueError, match="hf download facebook/vit-mae-base --local-dir"):
        load_encoder("facebook/vit-mae-base")
    with pytest.raises(ValueError, match="download it first"):
        load_encoder("https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth")


def test_norm_after_pooling_is_reported_if_it_becomes_the_last_norm(tmp_path: Path):
    path, model = transformers_model(
        tmp_path, "BeitForImageClassification", num_labels=5, use_relative_position_bias=True
    )
    encoder, report = load_encoder(path)
    assert torch.equal(encoder.norm.weight, model.model.pooler.layernorm.weight)
    assert "here applied to every token" in report.folded["norm.weight"]
