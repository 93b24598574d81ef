"""What encoder a file holds: from its tensors, and from the file's own record, which must not contradict them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from downstream.checkpoints.files import Source
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.vit import ARCHS

_DEFAULT_SIZE = 224  # of the images, where neither record nor tensors tell
_POSITIONS = {"relative": "rpe_k", "bias": "rpe_bias", "sincos": "pos_embed"}  # part of a parameter's name


class FoundSpec(NamedTuple):
    """The spec, and whether its image size is known; if not, it is 224 pixels, rounded down to whole patches."""

    spec: EncoderSpec
    size_known: bool


def find_spec(source: Source, state: Mapping[str, Tensor]) -> FoundSpec:
    """The spec of an encoder.

    Args:
        source: the file.
        state: the encoder's parameters in it, by our names.

    Raises:
        ValueError: the encoder cannot be expressed by a spec, or the file's record contradicts its tensors.
    """
    found: dict[str, str | int] = {
        "patch_size": _find_patch_size(source.path, state),
        "position": _find_position(source.path, state),
        "arch": _find_arch(source.path, state),
    }
    if source.spec is not None:
        for name, value in found.items():
            recorded = getattr(source.spec, name)
            if recorded != value:
                raise ValueError(f"{source.path} says {name}={recorded}, but its tensors are of {name}={value}")
        _check_grid(source.path, source.spec, state)
        return FoundSpec(source.spec, True)
    patch_size = int(found["patch_size"])
    grid = _find_square_grid(state)
    height, width = (side * patch_size for side in grid or (_DEFAULT_SIZE // patch_size,) * 2)
    return FoundSpec(EncoderSpec(str(found["arch"]), patch_size, (height, width), str(found["position"])), bool(grid))


def count_blocks(state: Iterable[str]) -> int:
    """One more than the largest number of a block."""
    return 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=-1)


def _find_patch_size(path: Path, state: Mapping[str, Tensor]) -> int:
    shape = tuple(state["patch_embed.proj.weight"].shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise ValueError(f"{path} embeds patches by {shape}; this encoder has square patches of 3 channels")
    return int(shape[2])


def _find_position(path: Path, state: Mapping[str, Tensor]) -> str:
    present = [kind for kind, part in _POSITIONS.items() if any(part in name for name in state)]
    if present == ["relative", "sincos"]:  # LoMaR's code never adds its table
        return "relative"
    if len(present) != 1:
        raise ValueError(
            f"{path} has {' and '.join(_POSITIONS[kind] for kind in present) or 'no'} positions; "
            f"this encoder has one kind of {', '.join(_POSITIONS.values())}"
        )
    return present[0]


def _find_arch(path: Path, state: Mapping[str, Tensor]) -> str:
    dim, depth = len(state["patch_embed.proj.weight"]), count_blocks(state)
    for name, arch in ARCHS.items():
        if (arch.dim, arch.depth) == (dim, depth):
            return name
    known = ", ".join(f"{name} ({arch.dim}, {arch.depth})" for name, arch in ARCHS.items())
    raise ValueError(f"{path} is {dim} wide and has {depth} blocks, which is none of {known}")


def _check_grid(path: Path, spec: EncoderSpec, state: Mapping[str, Tensor]) -> None:
    """Raises ValueError where tables of positions are not for the grid that a file says it has."""
    (height, width), table = spec.grid, state.get("pos_embed")
    fits = table is None or table.shape[1] - height * width in (0, 1)  # without or with a class token
    if not fits or any(length != (2 * height - 1) * (2 * width - 1) + 3 for length in _bias_lengths(state)):
        rows, cols = spec.image_size
        raise ValueError(f"{path} says image_size={rows}x{cols}, but its tables of positions are of another size")


def _find_square_grid(state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Rows and columns of patches that the tables of positions are for; None where there are none for a square."""
    if "pos_embed" in state:
        count = state["pos_embed"].shape[1]
        sides = [round(n**0.5) for n in (count - 1, count) if round(n**0.5) ** 2 == n]  # with or without a class token
    else:
        sides = [(round((length - 3) ** 0.5) + 1) // 2 for length in _bias_lengths(state)[:1]]
    return (sides[0], sides[0]) if sides else None


def _bias_lengths(state: Mapping[str, Tensor]) -> list[int]:
    return [len(tensor) for name, tensor in state.items() if _POSITIONS["bias"] in name]
