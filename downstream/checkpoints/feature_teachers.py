"""Reads the frozen teacher of `target.name=teacher` from a local file: any encoder, or a model of timm.

`read_feature_teacher` is what the entries call, before training.
"""

import logging
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor

from data.pixel_format import RGB
from downstream.checkpoints.files import read_source
from downstream.checkpoints.weights import build_encoder, read_encoder
from pretrain.methods.masking import Grid
from pretrain.methods.targets import TargetConfig
from pretrain.methods.targets.features import EncoderTeacher, FeatureTeacher, TeacherConfig, check_blocks, resize

_log = logging.getLogger(__name__)


def read_feature_teacher(config: TargetConfig, grid: Grid) -> FeatureTeacher | None:
    """The teacher of a target, at the image size at which it has as many patches as the trained encoder.

    Args:
        config: the `target` section.
        grid: rows and columns of patches of the encoder that is trained.

    Returns:
        The teacher, in fp32 on the CPU; None where the target is another one.

    Raises:
        ValueError: no file, one that cannot be read, or a teacher that does not fit; the message names the key to
            change.
    """
    if not isinstance(config, TeacherConfig):
        return None
    if config.file is None:
        raise ValueError(
            "target.name=teacher needs target.file: give a file with the teacher's weights, such as "
            "target.file=runs/NAME/encoder.safetensors; nothing is downloaded"
        )
    try:
        teacher: FeatureTeacher
        if config.timm_model:
            teacher = _timm_teacher(config.file, config.timm_model, config.encoder, grid)
        else:
            teacher = _encoder_teacher(config.file, config.encoder, grid)
    except ValueError as error:
        raise ValueError(f"target.file={config.file}: {error}") from None
    check_blocks(config.blocks, teacher.depth, config.file)
    return teacher


def _encoder_teacher(file: str, weights: str | None, grid: Grid) -> EncoderTeacher:
    found = read_encoder(file, weights=weights)
    patch_size = found.spec.patch_size
    if found.spec.pixels.format != RGB:
        raise ValueError(f"it is of {found.spec.pixels.format}: give a teacher of RGB in 8 bits")
    encoder, report = build_encoder(found, image_size=(grid[0] * patch_size, grid[1] * patch_size))
    _log.info("the teacher is %s", report)
    return EncoderTeacher(encoder)


def _timm_teacher(file: str, name: str, weights: str | None, grid: Grid) -> "TimmTeacher":
    """One of timm's models, all of whose parameters are in the file."""
    try:
        model: Any = timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError as error:
        raise ValueError(f"target.timm_model={name}: {error}") from None
    state = model.state_dict()
    given = {name: tensor for name, tensor in read_source(file, weights).tensors.items() if name in state}
    try:
        model.load_state_dict(given)
    except RuntimeError as error:
        lines = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ValueError(
            f"it does not have the weights of target.timm_model={name} by timm's names ({lines[:300]})"
        ) from None
    embed = getattr(model, "patch_embed", None)
    patch_size = getattr(embed, "patch_size", None)
    if patch_size is None or not all(hasattr(model, part) for part in ("blocks", "set_input_size")):
        raise ValueError(f"target.timm_model={name} has no patches of one size: give a Vision Transformer of timm's")
    size = (grid[0] * patch_size[0], grid[1] * patch_size[1])
    model.set_input_size(img_size=size)
    return TimmTeacher(model, size, grid, name)


class TimmTeacher(FeatureTeacher):
    """A frozen model of timm's. Its own mean and standard deviation of pixels are used."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, image_size: tuple[int, int], grid: Grid, name: str):
        super().__init__()
        self.model, self.image_size = model, image_size
        self.dim, self.depth = model.num_features, len(model.blocks)
        for key in ("mean", "std"):  # of red, green and blue in 0..1
            self.register_buffer(key, torch.tensor(model.pretrained_cfg[key])[:, None, None], persistent=False)
        self.eval().requires_grad_(False)
        with torch.no_grad():
            tokens = self.model.forward_intermediates(
                torch.zeros(1, 3, *image_size), indices=[0], intermediates_only=True, output_fmt="NLC"
            )[0].shape[1]
        if tokens != grid[0] * grid[1]:
            raise ValueError(
                f"target.timm_model={name} has {tokens} patches of an image of {image_size[0]}x{image_size[1]} pixels, "
                f"and the encoder that is trained {grid[0]}x{grid[1]}: give one that keeps the grid of its patches"
            )

    @torch.no_grad()
    def forward(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        pixels = resize(images, self.image_size).movedim(-1, 1).float() / 255
        streams: list[Tensor] = self.model.forward_intermediates(
            (pixels - self.mean) / self.std,
            indices=[block - 1 for block in blocks],
            intermediates_only=True,
            output_fmt="NLC",
        )
        return streams
