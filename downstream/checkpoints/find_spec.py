"""Finds what encoder a file holds: from its tensors, and from its own record, which must not contradict them."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from data.pixel_format import RGB
from downstream.checkpoints.files import Source
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.vit import ARCHS

_DEFAULT_SIZE = 224  # of the images, if neither record nor tensors show it
BIAS = "relative_position_bias_table"  # of one block or of all
_POSITIONS = {"relative": "rpe_k", "bias": BIAS, "sincos": "pos_embed"}  # part of a parameter's name


class FoundSpec(NamedTuple):
    """The spec, and whether its image size is known; if not, it is 224 pixels, rounded down to whole patches."""

    spec: EncoderSpec
    size_known: bool


def find_spec(source: Source, state: Mapping[str, Tensor]) -> FoundSpec:
    """Finds the spec of an encoder.

    Args:
        source: the file.
        state: the encoder's parameters in it, by our names.

    Raises:
        ValueError: the encoder cannot be expressed by a spec, or the file's record contradicts its tensors.
    """
    path, recorded = source.path, source.spec
    channels = recorded.pixels.channels if recorded else RGB.channels
    patch_size, position, arch = (
        _find_patch_size(path, state, channels),
        _find_position(path, state),
        _find_arch(path, state),
    )
    if recorded is None:
        _check_heads(source, arch)
        registers = count_registers(state)
        grid = _find_recorded_grid(source, state, patch_size) or _find_square_grid(state)
        height, width = (side * patch_size for side in grid or (_DEFAULT_SIZE // patch_size,) * 2)
        class_token = "cls_token" in state or not _has_a_row_for_each_patch(state, grid)
        spec = EncoderSpec(arch, patch_size, (height, width), position, class_token=class_token, registers=registers)
        return FoundSpec(spec, bool(grid))
    found_here = {"arch": arch, "patch_size": patch_size, "position": position, "registers": count_registers(state)}
    for name, found in found_here.items():
        if getattr(recorded, name) != found:
            raise ValueError(f"{path} says {name}={getattr(recorded, name)}, but its tensors have {name}={found}")
    if not fits_grid(state, recorded.grid):
        size = "x".join(map(str, recorded.image_size))
        raise ValueError(f"{path} says image_size={size}, but its position tables are for another grid of patches")
    return FoundSpec(recorded, True)


def fits_grid(state: Mapping[str, Tensor], grid: tuple[int, int]) -> bool:
    """Whether all position tables have as many entries as a grid needs, with or without some for prefix tokens."""
    rows, cols = grid
    if "pos_embed" in state and state["pos_embed"].shape[1] - rows * cols not in _prefix_rows(state):
        return False
    return all(length == (2 * rows - 1) * (2 * cols - 1) + 3 for length in _bias_lengths(state))


def count_registers(state: Mapping[str, Tensor]) -> int:
    """The number of tokens between the class token and the patches."""
    return state["reg_token"].shape[1] if "reg_token" in state else 0


def _prefix_rows(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """How many rows a position table may have in front: none, the class token's, or the registers' as well."""
    return tuple(dict.fromkeys((1, 0, 1 + count_registers(state))))


def count_blocks(state: Iterable[str]) -> int:
    """One more than the largest block number."""
    return 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=-1)


def _find_patch_size(path: Path, state: Mapping[str, Tensor], channels: int) -> int:
    shape = tuple(state["patch_embed.proj.weight"].shape)
    if len(shape) != 4 or shape[1] != channels or shape[2] != shape[3]:
        raise ValueError(
            f"{path} embeds patches with a kernel of {shape}; this encoder has square patches of {channels} channels"
        )
    return int(shape[2])


def _find_position(path: Path, state: Mapping[str, Tensor]) -> str:
    present = [kind for kind, part in _POSITIONS.items() if any(part in name for name in state)]
    if present == ["relative", "sincos"]:  # LoMaR's code never adds its table
        return "relative"
    if len(present) != 1:
        raise ValueError(
            f"{path} has {' and '.join(_POSITIONS[kind] for kind in present) or 'no'} positions; "
            f"this encoder has exactly one of {', '.join(_POSITIONS.values())}"
        )
    return present[0]


def _find_arch(path: Path, state: Mapping[str, Tensor]) -> str:
    dim, depth = len(state["patch_embed.proj.weight"]), count_blocks(state)
    for name, arch in ARCHS.items():
        if (arch.dim, arch.depth) == (dim, depth):
            return name
    known = ", ".join(f"{name} ({arch.dim}, {arch.depth})" for name, arch in ARCHS.items())
    raise ValueError(f"{path} is {dim} wide and has {depth} blocks, which matches none of {known}")


def _check_heads(source: Source, arch: str) -> None:
    """Refuses what a record shows and tensors do not: another number of heads, another activation."""
    heads = ARCHS[arch].heads
    problems = source.hub.problems(heads) if source.hub else []
    if arch == "vit_small" and any("momentum_encoder." in key for key in source.tensors):
        problems.append(f"MoCo v3's ViT-S has 12 heads (here: {heads})")
    if problems:
        raise ValueError(f"{source.path} is not this project's {arch}: {', '.join(problems)}")


def _has_a_row_for_each_patch(state: Mapping[str, Tensor], grid: tuple[int, int] | None) -> bool:
    """Whether a position table has no row for a class token."""
    return bool(grid) and "pos_embed" in state and state["pos_embed"].shape[1] == math.prod(grid or ())


def _find_recorded_grid(source: Source, state: Mapping[str, Tensor], patch_size: int) -> tuple[int, int] | None:
    """The grid of the image size in a hub folder's record; None if there is none, or the tables do not fit."""
    size = source.hub.image_size if source.hub else None
    if size is None:
        return None
    grid = size[0] // patch_size, size[1] // patch_size
    return grid if fits_grid(state, grid) else None


def _find_square_grid(state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """The square grid that the position tables fit; None if they fit none, or there are no tables."""
    if "pos_embed" in state:
        count = state["pos_embed"].shape[1]
        patches = [count - rows for rows in _prefix_rows(state) if count > rows]
        sides = [math.isqrt(n) for n in patches if math.isqrt(n) ** 2 == n]
    else:
        sides = [(math.isqrt(max(length - 3, 0)) + 1) // 2 for length in _bias_lengths(state)[:1]]
    return next(((side, side) for side in sides if fits_grid(state, (side, side))), None)


def _bias_lengths(state: Mapping[str, Tensor]) -> list[int]:
    return [len(tensor) for name, tensor in state.items() if BIAS in name]
