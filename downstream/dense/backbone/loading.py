"""A checkpoint into a backbone, strictly, and the proof that the backbone makes of images what pretraining made."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from downstream.checkpoints.files import Weights
from downstream.checkpoints.formats import Report
from downstream.checkpoints.compare import max_difference
from downstream.checkpoints.weights import build_encoder, features, read_encoder
from downstream.dense.backbone.relative_position import resize_positions
from pretrain.models.vit import ARCHS, ViT

if TYPE_CHECKING:
    from downstream.dense.backbone.plain_vit import PlainViT

# Parameters of a backbone that no encoder has.
FRESH = (".parallel.", ".propagate.", ".rel_pos_h", ".rel_pos_w")

_TOLERANCE = 1e-5


def load_start(backbone: "PlainViT", path: str, weights: Weights | None) -> Report:
    """Fills a backbone, all but its `FRESH` parameters, and compares features.

    Raises:
        ValueError: as of `load_encoder`; the file is of another architecture, patch or kind of position; or the
            backbone makes other features of it than the encoder.
    """
    try:
        found = read_encoder(path, weights=weights)
        rows, cols = found.spec.grid
        size = (rows * backbone.patch, cols * backbone.patch)
        encoder, report = build_encoder(found, image_size=size, patch_size=backbone.patch)
    except ValueError as error:
        raise ValueError(f"model.backbone.checkpoint: {error}") from None
    _check(backbone, encoder, path)
    _fill(backbone, encoder, report)
    difference = compare_features(backbone, encoder)
    if not difference <= _TOLERANCE:
        raise ValueError(
            f"model.backbone.checkpoint={path}: the backbone's features differ from the encoder's by {difference:.1e} "
            f"(at most {_TOLERANCE:.0e}): this must not happen; please report it with the file's report:\n{report}"
        )
    return report


def _check(backbone: "PlainViT", encoder: ViT, path: str) -> None:
    names = {arch: name for name, arch in ARCHS.items()}
    stored, mine = names[encoder.arch], names[backbone.arch]
    if stored != mine:
        raise ValueError(
            f"model.backbone.checkpoint={path} is {stored}, model.backbone.arch is {mine}: set it to {stored} "
            f"(a config of that size), or give another checkpoint"
        )
    kind = encoder.position
    if kind == "bias":
        raise ValueError(
            f"model.backbone.checkpoint={path} has learned relative bias tables (BEiT's, SimMIM's), and the backbone "
            f"offers position=relative or sincos only: give another checkpoint"
        )
    if kind != backbone.position:
        tables = {"relative": "relative tables (LoMaR's)", "sincos": "an absolute position table and no relative ones"}
        raise ValueError(
            f"model.backbone.checkpoint={path} has {tables[kind]}, and model.backbone.position is {backbone.position}: "
            f"set model.backbone.position={kind}, or give another checkpoint"
        )


def _fill(backbone: "PlainViT", encoder: ViT, report: Report) -> None:
    state = encoder.state_dict()
    if backbone.cls_token is None:
        del state["cls_token"]
        for key in report.used.pop("cls_token"):
            if key.endswith("cls_token"):  # not a table whose first row was added to it
                report.dropped[key] = "the class token: model.backbone.class_token=False"
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
def compare_features(backbone: "PlainViT", encoder: ViT) -> float:
    """The largest difference of both's tokens behind any of `out_blocks`, of random images of the encoder's size.

    The backbone's windows are off and it gets the encoder's class token and positions, if it has none or those of
    another grid. The comparison is done by a copy, in fp32 on the CPU.
    """
    # While mmengine initialises, every module refers to the parameters of the whole model: they are not copied.
    beside = {id(getattr(backbone, "_params_init_info", None)): None}
    twin = copy.deepcopy(backbone, beside).cpu().float().eval()
    rows, cols = encoder.grid
    shape = (2, 3, rows * encoder.patch_size, cols * encoder.patch_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x, grid = twin.embed(images, None)
    if backbone.position == "sincos":
        x = x + encoder.pos_embed[:, 1:]
    class_token: Tensor = encoder.cls_token if twin.cls_token is None else twin.cls_token
    x = torch.cat([class_token.expand(len(x), -1, -1), x], dim=1)
    found = twin.encode(x, grid, (0,) * len(twin.blocks))
    expected = _outputs(encoder, images, twin.out_blocks)
    differences = [max_difference(*pair) for pair in zip(found, expected, strict=True)]
    return float(torch.tensor(differences).max())  # NaN if one of them is


def _outputs(encoder: ViT, images: Tensor, numbers: Sequence[int]) -> list[Tensor]:
    """What the encoder's blocks of these numbers make, and in place of the last one's, what its norm makes of that."""
    made: dict[nn.Module, Tensor] = {}

    def keep(block: nn.Module, given: tuple[Any, ...], out: Tensor) -> None:
        made[block] = out

    hooks = [block.register_forward_hook(keep) for block in encoder.blocks]
    made[encoder.blocks[-1]] = features(encoder, images)
    for hook in hooks:
        hook.remove()
    return [made[encoder.blocks[number]] for number in numbers]
