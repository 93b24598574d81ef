"""Tests that damaged and malicious files and files of other kinds of models are rejected with clear errors."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import originals
from helpers.originals import PATCH, Bomb, noise
from safetensors.torch import save_file
from torch import Tensor

import downstream.checkpoints.timm_models
from downstream.checkpoints.weights import load_encoder, load_into
from pretrain.models.vit import ViT

assert downstream.checkpoints.timm_models


def assert_rejected(path: Path, *parts: str, **options: Any) -> None:
    """Assert that loading raises ValueError with these parts, in order, and the path in its message."""
    with pytest.raises(ValueError, match=".*".join(parts)) as raised:
        load_encoder(path, **options)
    assert str(path) in str(raised.value)


def save(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"model": state}, folder / "file.pth")
    return folder / "file.pth"


@pytest.mark.parametrize("save", [torch.save, originals.old_pickle])
@pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: {"model": {"cls_token": noise(1)}, "args": bomb}])
def test_pickle_that_would_run_code_is_rejected(save: Callable[..., None], wrap: Callable[..., Any], tmp_path: Path):
    trace, path = tmp_path / "it_ran", tmp_path / "bomb.pth"
    save(wrap(Bomb(trace)), path)
    assert_rejected(path, r"io\.open|builtins\.open|open", "could run code")
    assert not trace.exists()


def test_dangerous_class_inside_a_harmless_one_is_rejected(tmp_path: Path):
    trace = tmp_path / "it_ran"
    torch.save({"model": {"a": noise(1)}, "args": argparse.Namespace(inner=[Bomb(trace)])}, tmp_path / "bomb.pth")
    assert_rejected(tmp_path / "bomb.pth", "could run code")
    assert not trace.exists()


def _old_pickle(folder: Path) -> Path:
    originals.old_pickle({"model": originals.vit().state_dict()}, folder / "old.pth")
    return folder / "old.pth"


def _safetensors(folder: Path) -> Path:
    save_file(originals.vit().state_dict(), folder / "a.safetensors")
    return folder / "a.safetensors"


@pytest.mark.parametrize("make", [lambda folder: originals.mae(folder).path, _old_pickle, _safetensors])
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.7, 0.999])
def test_truncated_file_is_rejected(make: Callable[[Path], Path], fraction: float, tmp_path: Path):
    path = make(tmp_path)
    os.truncate(path, int(path.stat().st_size * fraction))
    assert_rejected(path, "bytes", "truncated", "copy it again")


@pytest.mark.parametrize("text", [b"<html>not found</html>", b"\x80\x02}q\x00.", b"\x80\x02K\x01."])
def test_files_that_are_not_checkpoints_are_rejected(text: bytes, tmp_path: Path):
    (tmp_path / "file.pth").write_bytes(text)
    # torch's own message would suggest weights_only=False.
    assert_rejected(
        tmp_path / "file.pth", "^(?!.*weights_only).*(not a checkpoint|not hold a dictionary|not a dictionary)"
    )
    assert_rejected(tmp_path / "none.pth", "no checkpoint")
    assert_rejected(tmp_path, "neither a run's folder")


def test_unknown_key_is_rejected(tmp_path: Path):
    state = {**originals.vit().state_dict(), "blocks.0.attn.novel": noise(3), "blocks.1.attn.novel": noise(3)}
    assert_rejected(save(state, tmp_path), r"blocks\.\*\.attn\.novel: unknown")


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("dist_token", "distillation"),
        ("blocks.0.mlp.w12.weight", "gated MLP"),
        ("blocks.0.attn.q_norm.weight", "queries and keys"),
        ("norm_pre.weight", "before the blocks"),
        ("blocks.0.attn.q_bias", "unknown"),  # without v_bias
        ("blocks.0.ls3.gamma", "unknown"),
    ],
)
def test_unsupported_parameters_are_rejected_with_a_reason(key: str, reason: str, tmp_path: Path):
    assert_rejected(
        save({**originals.vit().state_dict(), key: noise(16)}, tmp_path), key.replace(".0.", r"\.\*\."), reason
    )


def test_norm_after_pooling_becomes_the_last_norm_only_if_there_is_none(tmp_path: Path):
    state = originals.vit().state_dict()
    moved = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: w for name, w in state.items()}
    encoder, report = load_encoder(save(moved, tmp_path))
    assert torch.equal(encoder.norm.weight, state["norm.weight"])
    assert "after a classifier's pool" in report.folded["norm.bias"]
    assert report.used["norm.bias"] == ("fc_norm.bias",)
    both = {**state, "fc_norm.weight": noise(16), "fc_norm.bias": noise(16)}
    assert load_encoder(save(both, tmp_path))[1].dropped["fc_norm.bias"] == "the norm of a classifier"


@pytest.mark.parametrize("key", ["cls_token", "blocks.1.attn.qkv.bias", "norm.weight", "patch_embed.proj.bias"])
def test_missing_key_is_rejected(key: str, tmp_path: Path):
    state = originals.vit().state_dict()
    del state[key]
    assert_rejected(save(state, tmp_path), f"lacks {key}")


def test_error_for_another_shape_names_both_shapes(tmp_path: Path):
    narrow = originals.vit(mlp_ratio=2.0)
    assert_rejected(save(narrow.state_dict(), tmp_path), r"mlp\.fc1\.weight is \(32, 16\)", r"vit_tiny.* \(64, 16\)")
    grey = originals.vit(in_chans=1)
    assert_rejected(save(grey.state_dict(), tmp_path), r"\(16, 1, 4, 4\)", "3 channels")


def test_error_for_an_unknown_size_names_the_known_sizes(tmp_path: Path):
    wide = originals.vit(embed_dim=32)
    assert_rejected(save(wide.state_dict(), tmp_path), "32 wide and has 2 blocks", r"vit_base \(768, 12\)")


def test_metadata_that_contradicts_the_tensors_is_rejected(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    for metadata, message in (
        ({"arch": "vit_small"}, "says arch=vit_small, but its tensors have arch=vit_tiny"),
        ({"patch_size": "2"}, "says patch_size=2, but its tensors have patch_size=4"),
        ({"position": "relative"}, "says position=relative, but its tensors have position=sincos"),
        ({"image_size": "16x12"}, "says image_size=16x12, but its position tables are for another grid"),
        ({"image_size": "12"}, "has metadata that this project did not write"),
    ):
        spec = {"arch": "vit_tiny", "patch_size": "4", "image_size": "12x12", "position": "sincos"}
        save_file(originals.vit().state_dict(), path, metadata={**spec, **metadata})
        assert_rejected(path, message)


def test_error_for_another_architecture_names_both(tmp_path: Path):
    path = originals.mae(tmp_path).path
    with torch.device("meta"):
        small = ViT("vit_small", 16, (2, 2), relative=False)
    with pytest.raises(ValueError, match=r"mae\.pth is vit_tiny with sincos .* encoder is vit_small with sincos"):
        load_into(small, path)


@pytest.mark.parametrize(("make", "found"), [("mae", "sincos"), ("beit_finetuned", "bias"), ("lomar", "relative")])
def test_error_for_another_kind_of_position_names_both(make: str, found: str, tmp_path: Path):
    path = originals.ORIGINALS[make](tmp_path).path
    for kind in {"sincos", "bias", "relative"} - {found}:
        encoder = ViT("vit_tiny", PATCH, (3, 3), kind == "relative", bias=kind == "bias")
        before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
        with pytest.raises(ValueError, match=f"with {found} positions; the encoder is vit_tiny with {kind} positions"):
            load_into(encoder, path)
        assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_two_kinds_of_position_or_none_are_rejected(tmp_path: Path):
    both = originals.beit(use_rel_pos_bias=True, use_abs_pos_emb=True)
    assert_rejected(save(both.state_dict(), tmp_path), "relative_position_bias_table and pos_embed positions")
    assert_rejected(save(originals.vit(pos_embed="none").state_dict(), tmp_path), "has no positions")


def test_only_patch_sizes_14_and_16_are_converted(tmp_path: Path):
    assert_rejected(originals.mae(tmp_path).path, "4 pixels", "encoder of 8", "14 and 16", patch_size=8, image_size=24)
    assert_rejected(originals.mae(tmp_path).path, "13x12", "patch size 4", image_size=(13, 12))


def test_ambiguous_or_missing_encoders_are_rejected(tmp_path: Path):
    state = originals.vit().state_dict()
    both = {**originals.prefixed("encoder.", state), **originals.prefixed("teacher.encoder.", state)}
    assert_rejected(
        save(both, tmp_path),
        "2 encoders: encoder, teacher.encoder",
        "start.weights=encoder or target.encoder=encoder",
    )
    assert_rejected(save(both, tmp_path), "no student weights, only encoder, teacher.encoder", weights="student")
    known = r"no patch embedding .*patch_embed\.proj\.weight.*transformers"
    assert_rejected(save({"conv1.weight": noise(3)}, tmp_path), known)


def test_unknown_modules_outside_the_encoder_are_rejected(tmp_path: Path):
    state = originals.prefixed("backbone.", originals.vit().state_dict())
    assert_rejected(save({**state, "neck.0.weight": noise(3)}, tmp_path), r"neck\.\*\.weight: unknown")


def test_non_square_position_table_needs_its_image_size(tmp_path: Path):
    wide = originals.vit(img_size=(8, 20))
    path = save(wide.state_dict(), tmp_path)
    assert_rejected(path, "non-square", "give the size")
    assert load_encoder(path, image_size=(8, 20))[0].grid == (2, 5)
    biased = originals.beit(img_size=(8, 20), use_rel_pos_bias=True)
    path = save(biased.state_dict(), tmp_path)
    assert_rejected(path, "non-square", "give the size")
    assert load_encoder(path, image_size=(8, 20))[0].grid == (2, 5)


def test_timm_rejects_another_number_of_classes_or_size(tmp_path: Path):
    model = timm.create_model("lomar_vit_tiny_patch16_224", num_classes=7)
    save_file(model.state_dict(), tmp_path / "seven.safetensors")
    path = str(tmp_path / "seven.safetensors")
    with pytest.raises(RuntimeError, match=r"head\.weight.*\[7, 16\].*\[5, 16\]"):
        timm.create_model("lomar_vit_tiny_patch16_224", num_classes=5, checkpoint_path=path)
    with pytest.raises(RuntimeError, match=r"\[16\].*\[384\]"):
        timm.create_model("lomar_vit_small_patch16_224", num_classes=7, checkpoint_path=path)
    _, report = load_encoder(tmp_path / "seven.safetensors")
    assert report.dropped["head.weight"] == "a classifier of 7 classes"
