"""Reads the frozen teacher of `target.name=teacher` from a local file: any encoder, or a model of timm.

The entries call `read_feature_teacher` before training.
"""

import difflib
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


def read_feature_teacher(config: TargetConfig, grid: Grid, patch_size: int) -> FeatureTeacher | None:
    """Reads the teacher of a target, at the image size at which it has as many patches as the trained encoder.

    Args:
        config: the `target` section.
        grid: rows and columns of patches of the encoder to be trained.
        patch_size: of that encoder.

    Returns:
        The teacher, in fp32 on the CPU; None if the target is another one.

    Raises:
        ValueError: there is no file, it cannot be read, or the teacher does not fit; the message names the key to
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
        teacher = (_timm_teacher if config.timm_model else _encoder_teacher)(config, grid, patch_size)
    except ValueError as error:
        raise ValueError(f"target.file={config.file}: {error}") from None
    check_blocks(config.blocks, teacher.depth, config.file)
    return teacher


def _encoder_teacher(config: TeacherConfig, grid: Grid, patch_size: int) -> FeatureTeacher:
    assert config.file
    found = read_encoder(config.file, weights=config.encoder)
    if found.spec.pixels.format != RGB:
        raise ValueError(f"it expects {found.spec.pixels.format}: give a teacher for 8-bit RGB")
    size = _image_size(found.spec.patch_size, config, grid, patch_size)
    encoder, report = build_encoder(found, image_size=size)
    _log.info("the teacher is %s", report)
    if found.size_known and found.spec.grid != grid and found.spec.position != "relative":
        _say_interpolated(found.spec.grid, grid)
    return EncoderTeacher(encoder)


def _image_size(patch_size: int, config: TeacherConfig, grid: Grid, encoders: int) -> tuple[int, int]:
    """Height and width of the teacher's images; raises ValueError if they must be resized and that is not allowed.

    Args:
        patch_size: the teacher's.
        config: whether images may be resized.
        grid, encoders: grid and patch size of the encoder to be trained.
    """
    size = (grid[0] * patch_size, grid[1] * patch_size)
    if patch_size != encoders and not config.resize_images:
        height, width = (side * encoders for side in grid)
        raise ValueError(
            f"the teacher has patches of {patch_size} pixels, {height / patch_size:.4g}x{width / patch_size:.4g} per "
            f"image of {height}x{width}, but the encoder has patches of {encoders}, {grid[0]}x{grid[1]} per image: set "
            f"target.resize_images=true to show the teacher images of {size[0]}x{size[1]}, or "
            f"model.patch_size={patch_size}"
        )
    return size


def _say_interpolated(old: Grid, new: Grid) -> None:
    _log.info(
        "the teacher's positions are interpolated: they were trained on %dx%d patches, and it sees %dx%d", *old, *new
    )


def _timm_teacher(config: TeacherConfig, grid: Grid, patch_size: int) -> FeatureTeacher:
    """Builds one of timm's models; the file must have all of its parameters."""
    name = config.timm_model
    assert name is not None
    _check_timm_name(name)
    model: Any = timm.create_model(name, pretrained=False, num_classes=0)
    embed = getattr(model, "patch_embed", None)
    sides = getattr(embed, "patch_size", None)
    if sides is None or sides[0] != sides[1] or not all(hasattr(model, part) for part in ("blocks", "set_input_size")):
        raise ValueError(
            f"target.timm_model={name} has no square patches of one size: give one of timm's Vision Transformers"
        )
    _load_timm(model, name, config)
    size, old = _image_size(sides[0], config, grid, patch_size), tuple(model.patch_embed.grid_size)
    model.set_input_size(img_size=size)
    teacher = TimmTeacher(model, size, grid, name)
    mean, std = (", ".join(f"{value:.4g}" for value in model.pretrained_cfg[key]) for key in ("mean", "std"))
    _log.info(
        "the teacher is timm's %s, %d blocks, %d wide; it sees images of %dx%d, normalized with timm's mean (%s) and "
        "standard deviation (%s) for it, of red, green and blue in 0..1",
        name,
        teacher.depth,
        teacher.dim,
        *size,
        mean,
        std,
    )
    if old != grid and getattr(model, "pos_embed", None) is not None:
        _say_interpolated(old, grid)
    return teacher


def _check_timm_name(name: str) -> None:
    """Raises ValueError if timm has no such model, or no weights with such a tag; asks only timm itself."""
    known = {*timm.list_models(), *timm.list_models(pretrained=True)}
    if name not in known:
        close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.7)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models('vit*') lists the names"
        raise ValueError(f"target.timm_model={name} is not one of timm's models: {hint}")


def _load_timm(model: Any, name: str, config: TeacherConfig) -> None:
    """Fills a model; raises ValueError unless the file has all of its parameters, in their shapes."""
    assert config.file
    tensors, problems = read_source(config.file, config.encoder).tensors, []
    wanted: dict[str, Tensor] = model.state_dict()
    for key, parameter in wanted.items():
        if key not in tensors:
            problems.append(f"it has no {key}")
        elif tensors[key].shape != parameter.shape:
            problems.append(f"{key} is {tuple(tensors[key].shape)} in it, but {tuple(parameter.shape)} in the model")
    if problems:
        more = f", and {len(problems) - 1} other parameters do not fit" if problems[1:] else ""
        raise ValueError(
            f"the file does not have the weights of target.timm_model={name} under timm's names: {problems[0]}{more}; "
            f"give the model that they belong to, or leave out target.timm_model if they are another project's"
        )
    model.load_state_dict({key: tensors[key] for key in wanted})


class TimmTeacher(FeatureTeacher):
    """A frozen model of timm's, with its own mean and standard deviation of pixels."""

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
                f"target.timm_model={name} has {tokens} patches per image of {image_size[0]}x{image_size[1]} pixels, "
                f"but the trained encoder has {grid[0]}x{grid[1]}: give one that keeps the grid of its patches"
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
