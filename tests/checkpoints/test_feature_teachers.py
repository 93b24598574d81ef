"""Tests of a run's frozen teacher, read from our file or timm's, at the patch grid of the trained encoder."""

import logging
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.originals import TINY
from safetensors.torch import save_file

from downstream.checkpoints.feature_teachers import read_feature_teacher
from pretrain.methods.targets.features import (
    EMAConfig,
    EncoderTeacher,
    FeatureTarget,
    TeacherConfig,
    resize,
    standardize_over_patches,
)
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.features import features
from pretrain.models.patches import normalize_pixels
from pretrain.models.vit import ViT
from pretrain.trainer.safetensors_file import save_state_dict


@pytest.fixture
def teacher_file(tmp_path: Path) -> Path:
    """A tiny encoder file of ours, with 3 x 3 patches of 14 pixels."""
    torch.manual_seed(5)
    encoder = ViT("vit_tiny", 14, (3, 3), relative=False)
    spec = EncoderSpec("vit_tiny", 14, (42, 42), "sincos")
    save_state_dict(encoder.state_dict(), spec.to_metadata(), tmp_path / "teacher.safetensors")
    return tmp_path / "teacher.safetensors"


def test_teacher_sees_as_many_patches_as_the_encoder(teacher_file: Path):
    config = TeacherConfig(file=str(teacher_file), blocks=1, resize_images=True)
    teacher = read_feature_teacher(config, (2, 2), 16)
    assert isinstance(teacher, EncoderTeacher)
    assert (teacher.dim, teacher.depth, teacher.image_size) == (TINY.dim, TINY.depth, (28, 28))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    found = FeatureTarget(config, 16, teacher).ground_truth(images, images)
    pixels = F.interpolate(images.movedim(-1, 1).float(), (28, 28), mode="bicubic", antialias=True).clamp(0, 255)
    tokens = features(teacher.encoder, normalize_pixels(pixels.movedim(1, -1)).movedim(-1, 1), blocks=(TINY.depth,))[
        :, 1:
    ]
    torch.testing.assert_close(found, standardize_over_patches(tokens))


def test_images_of_the_right_size_are_not_resized():
    images = torch.randint(0, 256, (1, 6, 8, 3), dtype=torch.uint8)
    assert resize(images, (6, 8)) is images
    assert resize(images, (3, 4)).shape == (1, 3, 4, 3)


def test_timm_model_reads_a_local_file(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    name = "vit_tiny_patch16_224"
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    config = TeacherConfig(file=str(tmp_path / "timm.safetensors"), timm_model=name)
    with caplog.at_level(logging.INFO):
        teacher = read_feature_teacher(config, (14, 14), 16)
    assert teacher is not None
    assert (
        f"{name}, {teacher.depth} blocks, {teacher.dim} wide; it sees images of 224x224, "
        "normalized with timm's mean (0.5," in caplog.text
    )
    assert "interpolated" not in caplog.text
    images = torch.randint(0, 256, (2, 112, 112, 3), dtype=torch.uint8)
    last = teacher(images, (1, 2))
    pixels = (resize(images, (224, 224)).movedim(-1, 1) / 255 - 0.5) / 0.5  # timm's normalization for this model
    outputs = model.forward_intermediates(pixels, intermediates_only=True, output_fmt="NLC")
    torch.testing.assert_close(torch.stack(last), torch.stack(outputs))
    with caplog.at_level(logging.INFO):
        assert read_feature_teacher(config, (3, 5), 16).image_size == (48, 80)
    assert "positions are interpolated: they were trained on 14x14 patches, and it sees 3x5" in caplog.text
    with pytest.raises(
        ValueError, match=r"patches of 16 pixels, 3x5 per image of 48x80, .* 8, 6x10 per image: set target"
    ):
        read_feature_teacher(config, (6, 10), 8)


def test_timm_model_that_does_not_fit_the_file_is_rejected(tmp_path: Path):
    file = tmp_path / "timm.safetensors"
    save_file({"cls_token": torch.zeros(1, 1, 24), "pos_embed": torch.zeros(1, 3, 24)}, file)

    def error_for(name: str) -> str:
        with pytest.raises(ValueError, match=f"target.file={file}: ") as error:
            read_feature_teacher(TeacherConfig(file=str(file), timm_model=name), (14, 14), 16)
        return str(error.value)

    name = "vit_tiny_patch16_224"
    message = error_for(name)
    assert (
        f"the weights of target.timm_model={name} under timm's names: cls_token is (1, 1, 24) in it, but (1, 1, "
        in message
    )
    assert "other parameters do not fit; give the model that they belong to" in message
    assert "is not one of timm's models: did you mean vit_base_patch16_224 or" in error_for("vit_base_patch16_224px")
    assert "did you mean vit_base_patch16_224.orig_in21k" in error_for("vit_base_patch16_224.orig_21k")
    assert "is not one of timm's models: timm.list_models('vit*') lists" in error_for("nothing")
    assert "is not one of timm's models" in error_for("hf-hub:timm/anything"), "which would be downloaded"
    assert "has no square patches of one size: give one of timm's Vision" in error_for("resnet18")


def test_teacher_with_another_patch_grid_is_rejected(teacher_file: Path, caplog: pytest.LogCaptureFixture):
    config = TeacherConfig(file=str(teacher_file), blocks=1)
    with pytest.raises(
        ValueError,
        match=r"patches of 14 pixels, 2.286x2.286 per image of 32x32, but the encoder has patches of 16, 2x2 per image"
        r": set target.resize_images=true to show the teacher images of 28x28, or model.patch_size=14",
    ):
        read_feature_teacher(config, (2, 2), 16)
    with caplog.at_level(logging.INFO):
        assert read_feature_teacher(config, (3, 3), 14) is not None
    assert "interpolated" not in caplog.text
    with caplog.at_level(logging.INFO):
        assert read_feature_teacher(config, (2, 2), 14).image_size == (28, 28)
    assert "positions are interpolated: they were trained on 3x3 patches, and it sees 2x2" in caplog.text


def test_resize_images_does_not_change_the_resume_signature(teacher_file: Path):
    """The teacher's grid always equals the encoder's, so older runs without this key can resume with it."""
    kept, resized = (TeacherConfig(file=str(teacher_file), resize_images=flag) for flag in (False, True))
    assert kept.resume_signature() == resized.resume_signature()


def test_invalid_teachers_are_rejected(teacher_file: Path):
    file = str(teacher_file)
    digest = TeacherConfig(file=file).sha256
    assert digest is not None
    assert TeacherConfig(file=file, sha256=digest.upper()).sha256 == digest
    with pytest.raises(ValueError, match=rf"has the SHA-256 {digest}, not target.sha256=0000"):
        TeacherConfig(file=file, sha256="0000")
    with pytest.raises(ValueError, match="is not a file: give one with the teacher's weights"):
        TeacherConfig(file=str(teacher_file.parent))
    with pytest.raises(ValueError, match=r"needs target\.file"):
        read_feature_teacher(TeacherConfig(), (2, 2), 14)
    with pytest.raises(ValueError, match=r"target.blocks=9, but .* has \d+ blocks: set target.blocks to at most"):
        read_feature_teacher(TeacherConfig(file=file, blocks=9), (2, 2), 14)
    with pytest.raises(ValueError, match="holds the online weights, not the ema ones"):
        read_feature_teacher(TeacherConfig(file=file, encoder="ema"), (2, 2), 14)
    assert read_feature_teacher(EMAConfig(), (2, 2), 14) is None
