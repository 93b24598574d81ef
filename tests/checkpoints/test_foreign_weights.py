"""Tests that our encoder computes the same features from published checkpoints as their own modules."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import originals
from helpers.originals import ORIGINALS, PATCH, SAME_PARAMETERS, SAME_TO_FP32, feature_difference, images
from safetensors.torch import save_file
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from timm.models import vision_transformer
from timm.models.beit import Beit
from torch import Tensor

from downstream.checkpoints.files import read_source
from downstream.checkpoints.resize import resize_bias
from downstream.checkpoints.weights import features, load_encoder, load_into
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.vit import ViT


def assert_same(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ORIGINALS)
def test_features_match_the_original(name: str, tmp_path: Path):
    path, model = ORIGINALS[name](tmp_path)
    encoder, report = load_encoder(path)
    difference = feature_difference(encoder, model, images())
    # These round; joining biases and padding tables do not.
    rounded = {"LayerScale", "its position added to it, and zeros there", "their positions added to them"}
    folded = rounded & set(report.folded.values())
    assert difference < (SAME_TO_FP32 if folded else SAME_PARAMETERS)
    torch.testing.assert_close(features(encoder, images()), model.forward_features(images()), atol=1e-4, rtol=1e-4)
    assert not report.resized
    assert report.used.keys() == encoder.state_dict().keys()


@pytest.mark.parametrize("name", ORIGINALS)
def test_every_key_is_used_or_dropped_for_a_reason(name: str, tmp_path: Path):
    path, _ = ORIGINALS[name](tmp_path)
    _, report = load_encoder(path)
    used = {key for keys in report.used.values() for key in keys}
    assert used | report.dropped.keys() == read_source(path).tensors.keys()
    assert not used & report.dropped.keys()
    assert all(report.dropped.values())


@torch.no_grad()
@pytest.mark.parametrize(("make", "weights"), [("dino", "online"), ("dino", "ema"), ("lut", "online"), ("lut", "ema")])
def test_online_or_averaged_weights_can_be_chosen(make: str, weights: str, tmp_path: Path):
    path, model = getattr(originals, make)(tmp_path, weights)
    encoder, report = load_encoder(path, weights=weights)
    assert feature_difference(encoder, model, images()) < SAME_TO_FP32
    assert f"({weights} weights)" in str(report)


def test_default_weights_are_those_that_the_authors_evaluate(tmp_path: Path):
    assert load_encoder(originals.dino(tmp_path).path)[1].weights == "ema"  # the teacher
    assert load_encoder(originals.lut(tmp_path).path)[1].weights == "online"
    with pytest.raises(ValueError, match="no ema weights, only model"):
        load_encoder(originals.mae(tmp_path).path, weights="ema")


@torch.no_grad()
def test_safetensors_and_old_pickles_give_the_same_features(tmp_path: Path):
    _, model = originals.dino_backbone(tmp_path)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    originals.old_pickle({"model": model.state_dict()}, tmp_path / "a.pth")
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pth"):
        assert feature_difference(load_encoder(path)[0], model, images()) < SAME_TO_FP32


def test_scalars_of_an_older_numpy_are_read(tmp_path: Path):
    path = tmp_path / "a.pth"
    originals.old_pickle({"model": originals.vit().state_dict(), "lr": np.float64(0.5)}, path)
    content = path.read_bytes()
    assert b"numpy._core.multiarray" in content
    path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert load_encoder(path)[1].used


@torch.no_grad()
@pytest.mark.parametrize("name", ["mae", "dinov2", "deit3"])
@pytest.mark.parametrize("size", [(20, 8), (12, 24), 28])
def test_absolute_positions_resize_as_in_timm(name: str, size: int | tuple[int, int], tmp_path: Path):
    path, model = ORIGINALS[name](tmp_path)
    options = {"init_values": 1e-5} if name != "mae" else {}
    larger = originals.vit(img_size=size, no_embed_class=name == "deit3", **options)
    state = dict(model.state_dict())
    larger.load_state_dict(vision_transformer.checkpoint_filter_fn(state, larger))
    encoder, report = load_encoder(path, image_size=size)
    assert feature_difference(encoder, larger, images(size)) < SAME_TO_FP32
    assert "bicubic" in report.resized["pos_embed"]


def test_absolute_positions_resize_in_fp32_channel_by_channel(tmp_path: Path):
    _, model = originals.dino_backbone(tmp_path)
    save_file({name: tensor.half() for name, tensor in model.state_dict().items()}, tmp_path / "half.safetensors")
    encoder, _ = load_encoder(tmp_path / "half.safetensors", image_size=(5 * PATCH, 7 * PATCH))
    for channel in range(16):
        plane = model.pos_embed[:, 1:, channel].half().float().reshape(1, 1, 3, 3)
        resized = torch.nn.functional.interpolate(plane, size=(5, 7), mode="bicubic", antialias=True)
        assert_same(encoder.pos_embed[0, 1:, channel], resized.flatten().detach())


@torch.no_grad()
def test_non_square_position_table_resizes_by_rows_and_columns(tmp_path: Path):
    spec = EncoderSpec("vit_tiny", 4, (8, 20), "sincos")
    model = originals.vit(img_size=(8, 20))
    save_file(model.state_dict(), tmp_path / "a.safetensors", metadata=spec.to_metadata())
    encoder, _ = load_encoder(tmp_path / "a.safetensors", image_size=(16, 12))
    planes = model.pos_embed[0, 1:].T.reshape(1, 16, 2, 5)
    resized = torch.nn.functional.interpolate(planes, size=(4, 3), mode="bicubic", antialias=True)
    assert_same(encoder.pos_embed[0, 1:].T.reshape(1, 16, 4, 3), resized)


def test_keys_have_no_bias_if_the_original_has_none(tmp_path: Path):
    """Features cannot show this, because softmax cancels a bias that all keys share."""
    path, model = originals.simmim(tmp_path)
    bias = load_encoder(path)[0].blocks[1].attn.qkv.bias
    assert_same(bias, torch.cat([model.blocks[1].attn.q_bias, torch.zeros(16), model.blocks[1].attn.v_bias]))


@torch.no_grad()
@pytest.mark.parametrize("make", ["beit_finetuned", "simmim"])
def test_bias_tables_resize(make: str, tmp_path: Path):
    path, model = ORIGINALS[make](tmp_path)
    size = (5 * PATCH, 4 * PATCH)
    encoder, report = load_encoder(path, image_size=size)
    shared = {"use_shared_rel_pos_bias": True} if make == "simmim" else {"use_rel_pos_bias": True, "num_classes": 5}
    kind = Beit if make == "simmim" else originals.HalfBeit
    larger = originals.beit(kind=kind, img_size=size, init_values=0.1, **shared)
    state = dict(model.state_dict())
    for name in [name for name in state if name.endswith("bias_table")]:
        state[name] = resize_bias(state[name], (3, 3), (5, 4))
    larger.load_state_dict(state)
    assert feature_difference(encoder, larger, images(size)) < SAME_TO_FP32
    assert len(report.resized) == 2


def test_bias_tables_keep_near_offsets_and_stretch_far_ones():
    old, new = (14, 14), (20, 24)
    table = originals.noise(27 * 27 + 3, 2)
    resized = resize_bias(table, old, new)
    theirs = resize_rel_pos_bias_table(table, new, tuple(resized.shape), old_window_size=old)
    torch.testing.assert_close(resized, theirs, atol=1e-3, rtol=1e-3)  # timm computes the progression only to 1e-6
    before, after = table[:-3].reshape(27, 27, 2), resized[:-3].reshape(39, 47, 2)
    assert_same(after[18:21, 22:25], before[12:15, 12:15])
    assert_same(after[::38, ::46], before[::26, ::26])
    assert_same(resized[-3:], table[-3:])
    assert_same(resize_bias(table, old, (3, 2))[:-3].reshape(5, 3, 2), before[11:16, 12:15])
    assert_same(resize_bias(resize_bias(table, old, (1, 1)), (1, 1), (2, 2))[:-3], before[13, 13].expand(9, 2))


@torch.no_grad()
def test_lomar_tables_work_at_every_image_size(tmp_path: Path):
    path, model = originals.lomar(tmp_path)
    larger = originals.lomar_model(grid=8)
    larger.load_state_dict(model.state_dict())
    encoder, report = load_encoder(path, image_size=8 * PATCH)
    assert feature_difference(encoder, larger, images(8 * PATCH)) < SAME_PARAMETERS
    assert not report.resized
    assert "never uses" in report.dropped["pos_embed"]


@torch.no_grad()
def test_resized_kernel_gives_resized_patches_the_same_tokens(tmp_path: Path):
    model = originals.vit(img_size=42, patch_size=14)
    save_file(model.state_dict(), tmp_path / "14.safetensors")
    encoder, report = load_encoder(tmp_path / "14.safetensors", image_size=48, patch_size=16)
    small = images(14)
    large = torch.nn.functional.interpolate(small, size=16, mode="bicubic", antialias=True)
    token = torch.nn.functional.conv2d(large, encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias)
    torch.testing.assert_close(token, model.patch_embed.proj(small), atol=1e-4, rtol=1e-4)
    assert "14 -> 16" in report.resized["patch_embed.proj.weight"]
    assert "pos_embed" not in report.resized


@pytest.mark.parametrize(("old", "new"), [(14, 16), (16, 14)])
def test_kernels_resize_by_least_squares(old: int, new: int, tmp_path: Path):
    """As in FlexiViT, the new kernel's tokens of resized patches are as close as possible to the original tokens."""
    model = originals.vit(img_size=old, patch_size=old)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    encoder, _ = load_encoder(tmp_path / "a.safetensors", image_size=new, patch_size=new)
    basis = torch.eye(old**2).reshape(-1, 1, old, old)
    resize = torch.nn.functional.interpolate(basis, size=new, mode="bicubic", antialias=True).flatten(1)
    best = torch.linalg.pinv(resize.double()) @ model.patch_embed.proj.weight.flatten(2).flatten(0, 1).T.double()
    torch.testing.assert_close(
        encoder.patch_embed.proj.weight.flatten(2).flatten(0, 1).T.double(), best, atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_load_into_replaces_every_tensor(tmp_path: Path):
    path, model = originals.mae(tmp_path)
    encoder = ViT("vit_tiny", PATCH, (3, 3), relative=False)
    load_into(encoder, path)
    assert feature_difference(encoder, model, images()) < SAME_PARAMETERS
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in encoder.state_dict().items())
