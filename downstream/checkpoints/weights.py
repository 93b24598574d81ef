"""Loads any known checkpoint into our encoder, strictly, and says what became of every key.

`load_encoder(path)` builds the encoder that fits a file; `load_into(encoder, path)` fills one that exists.

What is resized: absolute positions and BEiT's bias tables, which have an entry per place or offset of one grid, and the
patch projection between 14 and 16 pixels. Contextual relative tables (LoMaR's) are not: their buckets are offsets in
patches, the same for every grid, and offsets farther than any in training share the outermost bucket.
"""

from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from downstream.checkpoints.files import Source, Weights, read_source
from downstream.checkpoints.formats import Report, Translated, count_blocks, translate
from downstream.checkpoints.resize import resize_bias
from pretrain.models.features import features as features  # of what is loaded here
from pretrain.models.vit import ARCHS, ViT

Size = int | tuple[int, int]


def load_encoder(
    path: Path | str, *, size: Size | None = None, patch: int | None = None, weights: Weights | None = None
) -> tuple[ViT, Report]:
    """The encoder of a checkpoint.

    Args:
        path: a run's folder, one of its checkpoints, or a file: ours, the LoMaR authors', MAE, LUT, SimMIM, BEiT, DINO,
            DINOv2, timm.
        size: of the images, in pixels, or (height, width); the file's unless given, 224 where it does not say.
        patch: side of a patch; the file's unless given; 14 and 16 may be exchanged.
        weights: `online`, or `ema` for their moving average; unless given what a method's authors evaluate.

    Returns:
        The encoder, in fp32 on the CPU, and what became of every key.

    Raises:
        ValueError: the file is damaged, wants to run code, is of an architecture that is not in `ARCHS`, or has a key
            that is not understood.
    """
    source = read_source(path, weights)
    found = translate(source)
    stored_patch = _stored_patch(source, found)
    patch = patch or stored_patch
    if size is None:
        rows, cols = found.grid or (224 // stored_patch,) * 2
        size = (rows * stored_patch, cols * stored_patch)
    height, width = (size, size) if isinstance(size, int) else size
    if height % patch or width % patch or min(height, width) < patch:
        raise ValueError(f"size={height}x{width} is no multiple of patch={patch}, for {source.path}: give another size")
    kind = _kind(source, found)
    encoder = ViT(
        _find_arch(source, found), patch, (height // patch, width // patch), kind == "relative", bias=kind == "bias"
    )
    _fill(encoder, source, found)
    return encoder.eval(), found.report


def load_into(encoder: ViT, path: Path | str, *, weights: Weights | None = None) -> Report:
    """Fills an encoder, resizing to its patch and grid; nothing of it is left as it was.

    Args:
        encoder: of any size; its parameters are overwritten.
        path, weights: as of `load_encoder`.

    Raises:
        ValueError: as of `load_encoder`, and where the file is of another architecture or kind of position.
    """
    return fill(encoder, read_source(path, weights))


def fill(encoder: ViT, source: Source) -> Report:
    """`load_into` with what has been read already."""
    found = translate(source)
    _fill(encoder, source, found)
    return found.report


def position(encoder: ViT) -> str:
    """`relative`, `bias` or `sincos`; the last is any absolute table, of which a loaded one may be a learned one."""
    return "relative" if encoder.relative else "bias" if encoder.bias else "sincos"


def _kind(source: Source, found: Translated) -> str:
    kinds = {"relative": "rpe_k", "bias": "rpe_bias", "sincos": "pos_embed"}
    present = [kind for kind, mark in kinds.items() if any(mark in name for name in found.state)]
    if len(present) != 1:
        raise ValueError(
            f"{source.path} has {' and '.join(kinds[kind] for kind in present) or 'no'} positions; "
            f"this encoder has one kind of {', '.join(kinds.values())}"
        )
    return present[0]


def _stored_patch(source: Source, found: Translated) -> int:
    shape = tuple(found.state["patch_embed.proj.weight"].shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise ValueError(f"{source.path} embeds patches by {shape}; this encoder has square patches of 3 channels")
    return int(shape[2])


def _find_arch(source: Source, found: Translated) -> str:
    dim, depth = len(found.state["patch_embed.proj.weight"]), count_blocks(found.state)
    for name, arch in ARCHS.items():
        if (arch.dim, arch.depth) == (dim, depth):
            said = source.facts.get("arch", name)
            if said != name:
                raise ValueError(f"{source.path} says that it is {said}, but its tensors are of {name}")
            return name
    known = ", ".join(f"{name} ({arch.dim}, {arch.depth})" for name, arch in ARCHS.items())
    raise ValueError(f"{source.path} is {dim} wide and has {depth} blocks, which is none of {known}")


def _fill(encoder: ViT, source: Source, found: Translated) -> None:
    """Resizes where that is meant, checks everything, then writes."""
    arch, kind = _find_arch(source, found), _kind(source, found)
    if ARCHS[arch] != encoder.arch or kind != position(encoder):
        mine = next((name for name, known in ARCHS.items() if known == encoder.arch), str(encoder.arch))
        raise ValueError(
            f"{source.path} is {arch} with {kind} positions; the encoder is {mine} with {position(encoder)} positions"
        )
    state = dict(found.state)
    _resize_patch(encoder, state, source, found)
    if kind != "relative":
        _resize_positions(encoder, state, source, found)
    wanted = encoder.state_dict()
    if missing := sorted(wanted.keys() - state.keys()):
        raise ValueError(f"{source.path} lacks {', '.join(missing[:5])}{', ...' if missing[5:] else ''}")
    for name, tensor in state.items():
        if name not in wanted or tensor.shape != wanted[name].shape:
            here = tuple(wanted[name].shape) if name in wanted else "not there"
            raise ValueError(f"{source.path}: {name} is {tuple(tensor.shape)}, in the encoder ({arch}) it is {here}")
    encoder.load_state_dict(state, strict=True)


def _resize_patch(encoder: ViT, state: dict[str, Tensor], source: Source, found: Translated) -> None:
    stored = _stored_patch(source, found)
    if stored == encoder.patch_size:
        return
    if {stored, encoder.patch_size} != {14, 16}:
        raise ValueError(
            f"{source.path} has patches of {stored} pixels, the encoder of {encoder.patch_size}: "
            f"only 14 and 16 are exchanged"
        )
    name = "patch_embed.proj.weight"
    # FlexiViT's pseudo-inverse: resized patches give the same tokens, which resizing the kernel itself would not do.
    state[name] = resample_patch_embed(state[name], [encoder.patch_size] * 2, interpolation="bicubic", antialias=True)
    found.report.resized[name] = f"{stored} -> {encoder.patch_size} pixels, bicubic by pseudo-inverse"


def _resize_positions(encoder: ViT, state: dict[str, Tensor], source: Source, found: Translated) -> None:
    table, grid = state.get("pos_embed"), found.grid
    if grid is None and table is not None and table.shape[1] == 1 + encoder.grid[0] * encoder.grid[1]:
        return  # not square, nothing says what else, and it fits
    if grid is None:
        raise ValueError(
            f"{source.path} has positions for a grid that is not square, and does not say for which: "
            f"give the size it was trained at"
        )
    if grid == encoder.grid:
        return
    what = f"{grid[0]}x{grid[1]} -> {encoder.grid[0]}x{encoder.grid[1]}"
    if table is not None:
        state["pos_embed"] = resample_abs_pos_embed(
            table, list(encoder.grid), old_size=list(grid), interpolation="bicubic", antialias=True
        )
        found.report.resized["pos_embed"] = f"{what} patches, bicubic"
        return
    for name in [name for name in state if "rpe_bias" in name]:
        state[name] = resize_bias(state[name], grid, encoder.grid)
        found.report.resized[name] = f"{what} patches, geometric"


def max_difference(first: Tensor, second: Tensor) -> float:
    """The largest difference of two features, as a share of the largest feature where that is above one."""
    return float((first - second).abs().max() / torch.clamp(first.abs().max(), min=1.0))
