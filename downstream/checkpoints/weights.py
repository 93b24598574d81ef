"""Loads any known checkpoint into our encoder, strictly, and reports what became of every key.

    load_encoder(path, image_size=None, patch_size=None, weights=None, pixels=None) -> encoder, report
    load_into(encoder, path, weights=None) -> report           # an encoder that exists

Both consist of steps, for callers that decide after seeing what a file holds, which is read once:

    found = read_encoder(path, weights=None)                   # EncoderWeights: spec, size_known, state, report
    build_encoder(found, image_size=None, patch_size=None) -> encoder, report
    fill_encoder(encoder, found) -> report

Absolute positions and BEiT's bias tables have an entry for every position or offset of one grid, so they are resized.
So is the patch projection between 14 and 16 pixels; for another number of channels it follows timm's rule. Contextual
relative tables (LoMaR's) are not resized: their buckets are offsets in patches, the same for every grid, and offsets
farther than any in training share the outermost bucket.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from data.pixel_format import Pixels
from data.transforms import height_width
from downstream.checkpoints.choose import Weights
from downstream.checkpoints.files import read_source
from downstream.checkpoints.find_spec import BIAS, fits_grid
from downstream.checkpoints.fold import SCALE
from downstream.checkpoints.formats import EncoderWeights, translate
from downstream.checkpoints.names import SHARED_BIAS
from downstream.checkpoints.pixels import match_pixels
from downstream.checkpoints.report import Report
from downstream.checkpoints.resize import resize_bias
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.features import features as features  # for encoders loaded here
from pretrain.models.vit import CLASS_ADAPTER, ViT

Size = int | tuple[int, int]


def load_encoder(
    path: Path | str,
    *,
    image_size: Size | None = None,
    patch_size: int | None = None,
    weights: Weights | None = None,
    pixels: Pixels | None = None,
) -> tuple[ViT, Report]:
    """Loads the encoder of a checkpoint.

    Args:
        path: a run's folder, one of its checkpoints, a file or a folder of the Hugging Face hub: ours, the LoMaR
            authors', MAE, LUT, SimMIM, BEiT, DINO, DINOv2, I-JEPA, MoCo v3, timm, transformers, mmpretrain.
        image_size: in pixels, or (height, width); default: the file's, or 224 if it does not say.
        patch_size: side of a patch in pixels; default: the file's; 14 and 16 can be converted into each other.
        weights: `online`, `ema` for their moving average, or the name of one of several encoders in the file; default:
            those that a method's authors evaluate.
        pixels: statistics of the pixels that the weights were trained on; default: as `find_pixels` finds.

    Returns:
        The encoder, in fp32 on the CPU in eval mode, and what became of every key.

    Raises:
        ValueError: the file is damaged, could run code, has an architecture that is not in `ARCHS`, contradicts itself,
            or has a key that is not understood.
    """
    found = read_encoder(path, weights=weights, pixels=pixels)
    return build_encoder(found, image_size=image_size, patch_size=patch_size)


def load_into(encoder: ViT, path: Path | str, *, weights: Weights | None = None) -> Report:
    """Fills an encoder, resizing to its patch size and grid; every parameter is overwritten.

    Args:
        encoder: of any size.
        path, weights: as in `load_encoder`.

    Raises:
        ValueError: as in `load_encoder`, or the file has another architecture or kind of position.
    """
    return fill_encoder(encoder, read_encoder(path, weights=weights))


def read_encoder(path: Path | str, *, weights: Weights | None = None, pixels: Pixels | None = None) -> EncoderWeights:
    """Reads what a checkpoint holds, in its own sizes; arguments and errors as in `load_encoder`."""
    return translate(read_source(path, weights), pixels)


def build_encoder(
    found: EncoderWeights,
    *,
    image_size: Size | None = None,
    patch_size: int | None = None,
    pixels: Pixels | None = None,
) -> tuple[ViT, Report]:
    """Builds a new encoder from what was read, with the same sizes and pixels or others; like `load_encoder`."""
    spec = found.spec
    size, patch_size = image_size or spec.image_size, patch_size or spec.patch_size
    height, width = height_width(size)
    if height % patch_size or width % patch_size or min(height, width) < patch_size:
        raise ValueError(
            f"{found.report.path}: the image size {height}x{width} is not a multiple of the patch size {patch_size}: "
            f"give another size"
        )
    encoder = replace(spec, image_size=(height, width), patch_size=patch_size, pixels=pixels or spec.pixels).build()
    report = fill_encoder(encoder, found)
    return encoder.eval(), report


def fill_encoder(encoder: ViT, found: EncoderWeights) -> Report:
    """Like `load_into`, with what was read; nothing is written unless all of it fits.

    Returns:
        The report of `found`, with what was resized.
    """
    path, spec, mine = found.report.path, found.spec, EncoderSpec.of(encoder)
    if (spec.arch, spec.position) != (mine.arch, mine.position):
        raise ValueError(
            f"{path} is {spec.arch} with {spec.position} positions; "
            f"the encoder is {mine.arch} with {mine.position} positions"
        )
    state, resized = dict(found.state), dict(found.report.resized)
    if spec.patch_size != mine.patch_size:
        resized |= _resize_patches(state, path, spec.patch_size, mine.patch_size)
    resized |= match_pixels(state, spec.pixels, mine.pixels)
    if spec.position != "relative":
        resized |= _resize_positions(state, found, mine.grid)
    if spec.registers != mine.registers:
        raise ValueError(f"{path} has {spec.registers} registers, the encoder has {mine.registers}")
    wanted = encoder.state_dict()
    resized |= _as_pretrained(state, wanted, path)
    if spec.class_token is False and encoder.cls_token is not None:
        state["cls_token"] = wanted["cls_token"]
        resized["cls_token"] = "the file has none: it stays as initialized"
    if missing := sorted(wanted.keys() - state.keys()):
        raise ValueError(f"{path} lacks {', '.join(missing[:5])}{', ...' if missing[5:] else ''}")
    for name, tensor in state.items():
        if name not in wanted or tensor.shape != wanted[name].shape:
            here = tuple(wanted[name].shape) if name in wanted else "missing"
            raise ValueError(f"{path}: {name} is {tuple(tensor.shape)}, but in the encoder ({spec.arch}) it is {here}")
    encoder.load_state_dict(state, strict=True)
    return replace(found.report, used=dict(found.report.used), dropped=dict(found.report.dropped), resized=resized)


def _as_pretrained(state: dict[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> dict[str, str]:
    """Adds what an encoder to be pretrained has and the state lacks: a table for all blocks, scales, an adapter.

    Returns, like `_resize_positions`, what was done to each parameter that changed.
    """
    changed = {}
    if SHARED_BIAS in wanted and SHARED_BIAS not in state:
        first, *others = [name for name in state if BIAS in name]
        if any(not torch.equal(state[first], state[name]) for name in others):
            raise ValueError(f"{path} has a different bias table in each block, but the encoder's blocks share one")
        state[SHARED_BIAS] = state[first]
        for name in (first, *others):
            del state[name]
    for name in wanted:
        if name.endswith(SCALE) and name not in state:
            state[name] = torch.ones_like(wanted[name])
            changed[name] = "the file has none, or has folded it into the matrix before: ones"
        if name in CLASS_ADAPTER and name not in state:
            state[name], changed[name] = wanted[name], "the file has none: it stays as initialized"
    return changed


def _resize_patches(state: dict[str, Tensor], path: Path, old: int, new: int) -> dict[str, str]:
    """Resizes the patch projection; returns, like `_resize_positions`, what was done to it."""
    if {old, new} != {14, 16}:
        raise ValueError(f"{path} has patches of {old} pixels, the encoder of {new}: only 14 and 16 can be converted")
    name = "patch_embed.proj.weight"
    # FlexiViT's pseudo-inverse: resized patches give the same tokens, which resizing the kernel itself would not do.
    state[name] = resample_patch_embed(state[name], [new, new], interpolation="bicubic", antialias=True)
    return {name: f"{old} -> {new} pixels, bicubic by pseudo-inverse"}


def _resize_positions(state: dict[str, Tensor], found: EncoderWeights, new: tuple[int, int]) -> dict[str, str]:
    table, old = state.get("pos_embed"), found.spec.grid
    if not found.size_known:
        if fits_grid(state, new):
            return {}
        raise ValueError(
            f"{found.report.path} has positions for a non-square grid, but does not say which: "
            f"give the size that it was trained at"
        )
    if old == new:
        return {}
    change = f"{old[0]}x{old[1]} -> {new[0]}x{new[1]}"
    if table is not None:
        state["pos_embed"] = resample_abs_pos_embed(
            table, list(new), old_size=list(old), interpolation="bicubic", antialias=True
        )
        return {"pos_embed": f"{change} patches, bicubic"}
    tables = [name for name in state if BIAS in name]
    state |= {name: resize_bias(state[name], old, new) for name in tables}
    return dict.fromkeys(tables, f"{change} patches, geometric")
