"""Loads a checkpoint into a backbone, strictly, and checks that the backbone computes the encoder's features."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import Tensor, nn

from data.pixel_format import IMAGENET, RGB
from downstream.checkpoints.choose import Weights
from downstream.checkpoints.compare import FLOAT64_TOLERANCE, float64_copy, max_difference, random_images
from downstream.checkpoints.report import Report
from downstream.checkpoints.weights import build_encoder, features, read_encoder
from downstream.dense.backbone.plain_vit import PlainViT
from downstream.dense.backbone.relative_position import resize_positions
from pretrain.models.vit import ARCHS, ViT

# Parameters of a backbone that no encoder has.
FRESH = (".parallel.", ".propagate.", ".rel_pos_h", ".rel_pos_w")


@WEIGHT_INITIALIZERS.register_module()
class EncoderCheckpoint:
    """Starts a `PlainViT` from an encoder: `init_cfg=dict(type="EncoderCheckpoint", checkpoint=FILE)`.

    With our commands: `start.checkpoint=FILE`, and `start.weights=ema`.

    Args:
        checkpoint, weights: see `downstream.checkpoints.weights.load_encoder`.
    """

    wholemodule = False  # set by mmengine; a backbone is always filled as a whole

    def __init__(self, checkpoint: str, weights: Weights | None = None):
        self.checkpoint, self.weights = checkpoint, weights

    def __call__(self, module: nn.Module) -> None:
        """Fills the module; raises ValueError if it is not a `PlainViT`, and like `load_start`."""
        if not isinstance(module, PlainViT):
            raise ValueError(f"init_cfg: EncoderCheckpoint fills a PlainViT, not a {type(module).__name__}")
        print_log(str(load_start(module, self.checkpoint, self.weights)), logger="current")


def load_start(backbone: PlainViT, path: str, weights: Weights | None) -> Report:
    """Fills all but a backbone's `FRESH` parameters, and compares features.

    Raises:
        ValueError: as in `load_encoder`; the file differs in architecture, patch size or kind of position; or the
            backbone's features differ from the encoder's.
    """
    arch = next(name for name, arch in ARCHS.items() if arch == backbone.arch)
    class_token = backbone.cls_token is not None
    registers = 0 if backbone.reg_token is None else backbone.reg_token.shape[1]
    encoder, report = read_start(path, weights, arch, backbone.patch_size, backbone.position, class_token, registers)
    _fill(backbone, encoder, report)
    difference = compare_features(backbone, encoder)
    if not difference <= FLOAT64_TOLERANCE:
        raise ValueError(
            f"start.checkpoint={path}: the backbone's features differ from the encoder's by {difference:.1e} of the "
            f"largest (at most {FLOAT64_TOLERANCE:.0e}): this should never happen; please report it, with this "
            f"report on the file:\n{report}"
        )
    return report


def read_start(
    path: str,
    weights: Weights | None,
    arch: str = "vit_base",
    patch_size: int = 16,
    position: str = "relative",
    class_token: bool = False,
    registers: int = 0,
) -> tuple[ViT, Report]:
    """The encoder that a backbone with these arguments starts from, with patches of its size.

    Raises:
        ValueError: as in `load_encoder`; the file differs in architecture, patch size or kind of position, or it lacks
            a required class token or has another number of registers beside it.
    """
    try:
        found = read_encoder(path, weights=weights)
        rows, cols = found.spec.grid
        if found.spec.pixels.format != RGB:
            raise ValueError(
                f"{path} was trained on {found.spec.pixels.format}, but detection and segmentation need 8-bit RGB: "
                f"give a checkpoint trained on that"
            )
        size = rows * patch_size, cols * patch_size
        encoder, report = build_encoder(found, image_size=size, patch_size=patch_size, pixels=IMAGENET)
    except ValueError as error:
        raise ValueError(f"start.checkpoint: {error}") from None
    stored = next(name for name, arch in ARCHS.items() if arch == encoder.arch)
    if stored != arch:
        raise ValueError(
            f"start.checkpoint={path} is {stored}, but model.backbone.arch is {arch}: set it to {stored} "
            f"(use a config of that size), or give another checkpoint"
        )
    if encoder.cls_token is None and class_token:
        raise ValueError(
            f"start.checkpoint={path} has no class token: set model.backbone.class_token=False, or give another one"
        )
    if class_token and encoder.registers != registers:
        raise ValueError(
            f"start.checkpoint={path} has {encoder.registers} registers, but model.backbone.registers is {registers}: "
            f"set it to {encoder.registers}, or drop them with model.backbone.class_token=False"
        )
    kind = encoder.position
    if kind == "bias":
        raise ValueError(
            f"start.checkpoint={path} has learned relative bias tables (BEiT's, SimMIM's), but the backbone "
            f"supports only position=relative or sincos: give another checkpoint"
        )
    if kind != position:
        tables = {"relative": "relative tables (LoMaR's)", "sincos": "an absolute position table and no relative ones"}
        raise ValueError(
            f"start.checkpoint={path} has {tables[kind]}, but model.backbone.position is {position}: "
            f"set model.backbone.position={kind}, or give another checkpoint"
        )
    return encoder, report


def _fill(backbone: PlainViT, encoder: ViT, report: Report) -> None:
    state = encoder.state_dict()
    if backbone.cls_token is None:
        for name, what in (("cls_token", "the class token"), ("reg_token", "registers")):
            state.pop(name, None)
            for key in report.used.pop(name, ()):
                if not key.endswith(("pos_embed", "position_embeddings")):  # one row of these was added to the token
                    report.dropped[key] = f"{what}: model.backbone.class_token=False"
    if backbone.position == "sincos":
        state["pos_embed"] = resize_positions(state["pos_embed"][:, 1:], encoder.grid, backbone.grid)
        if encoder.grid != backbone.grid:
            (rows, cols), (height, width) = encoder.grid, backbone.grid
            report.resized["pos_embed"] = f"{rows}x{cols} -> {height}x{width} patches, bicubic"
    missing, unexpected = backbone.load_state_dict(state, strict=False)
    missing = [name for name in missing if not any(mark in name for mark in FRESH)]
    assert not missing, missing
    assert not unexpected, unexpected


@torch.no_grad()
def compare_features(backbone: PlainViT, encoder: ViT) -> float:
    """The largest difference between the two models' tokens after any of `out_indices`, on random images.

    The images have the encoder's size. The backbone runs without windows, with the encoder's absolute positions, and
    with the encoder's prefix tokens if it has no class token. Both are compared as float64 copies on the CPU.

    Returns:
        As `max_difference`: relative to the largest feature; NaN if a feature is NaN.
    """
    # During mmengine's initialization every module refers to the parameters of the whole model: do not copy them.
    skipped: dict[int, object] = {id(getattr(backbone, "_params_init_info", None)): None}
    backbone_copy, encoder_copy = float64_copy(backbone, skipped), float64_copy(encoder)
    rows, cols = encoder.grid
    images = random_images(rows * encoder.patch_size, cols * encoder.patch_size)
    x, grid = backbone_copy.embed(images, None)
    if backbone.position == "sincos":
        x = x + encoder_copy.pos_embed[:, 1:]
    owner = encoder_copy if backbone_copy.cls_token is None else backbone_copy
    prefix = [token.expand(len(x), -1, -1) for token in (owner.cls_token, owner.reg_token) if token is not None]
    x = torch.cat([*prefix, x], dim=1)
    found = backbone_copy.encode(x, grid, (0,) * len(backbone_copy.blocks))
    expected = _outputs(encoder_copy, images, backbone_copy.out_indices)
    differences = [max_difference(*pair) for pair in zip(found, expected, strict=True)]
    return float(torch.tensor(differences).max())  # NaN if one of them is


def _outputs(encoder: ViT, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
    """The outputs of the encoder's blocks with these indices; for the last block, the output of the final norm."""
    outputs: dict[nn.Module, Tensor] = {}

    def keep(block: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        outputs[block] = output

    hooks = [block.register_forward_hook(keep) for block in encoder.blocks]
    tokens = features(encoder, images)
    outputs[encoder.blocks[-1]] = tokens if encoder.cls_token is not None else tokens[:, 1:]  # drop their mean
    for hook in hooks:
        hook.remove()
    return [outputs[encoder.blocks[index]] for index in indices]
