"""Fills what a method has besides its encoder from a file, by parts: `decoder.blocks`, `predictor.head`, `projector`.

A part is taken whole or not at all. Parts of a decoder belong together: unless `start.load` says otherwise, a decoder
of another kind is not taken, and one of another depth or width is refused.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from downstream.checkpoints.files import Source
from downstream.checkpoints.formats import Report
from pretrain.sections import Load

# Prefixes of the names below, for a method in LUT; LUT's own heads have none. A method alone gets the same names.
METHOD = "method."
ENCODER = "method.encoder."
# Last names of parts that may differ: layers that are as wide as the target, and PR-MIM's, which is optional.
_REPLACEABLE = {"head", "pred", "exits", "aggregation"}

_LAYER = r"decoder\.decoder_layers\.(\d+)\."
# Keys of other projects that are not their encoder's -> ours.
_THEIRS = (
    (r"decoder_(embed|blocks|norm|pred)\.(.+)", r"method.decoder.\1.\2"),  # MAE, LUT
    (r"wfm\.linear\.weight", r"method.decoder.inter_block.weight"),  # CrossMAE
    (r"dec_norms\.(.+)", r"method.decoder.inter_block.norms.\1"),  # CrossMAE
    (r"encoder_pred\.(.+)", r"method.predictor.head.\1"),  # LoMaR
    (r"head\.(\d+\..+)", r"projector.\1"),  # LUT
    (r"predictor\.(\d+\..+)", r"predictor.\1"),  # LUT
    (r"decoder\.mask_token", r"method.decoder.mask_token"),  # transformers' MAE, as are the rest
    (r"decoder\.decoder_(embed|norm|pred)\.(.+)", r"method.decoder.\1.\2"),
    (_LAYER + r"layernorm_before\.(.+)", r"method.decoder.blocks.\1.norm1.\2"),
    (_LAYER + r"layernorm_after\.(.+)", r"method.decoder.blocks.\1.norm2.\2"),
    (
        _LAYER + r"attention\.(?:attention\.)?([qkv])\w+\.(.+)",
        r"method.decoder.blocks.\1.attn.\2.\3",
    ),
    (_LAYER + r"attention\.(?:output\.dense|o_proj)\.(.+)", r"method.decoder.blocks.\1.attn.proj.\2"),
    (_LAYER + r"(?:intermediate\.dense|mlp\.fc1)\.(.+)", r"method.decoder.blocks.\1.mlp.fc1.\2"),
    (_LAYER + r"(?:output\.dense|mlp\.fc2)\.(.+)", r"method.decoder.blocks.\1.mlp.fc2.\2"),
)

_Parts = Mapping[str, Mapping[str, Tensor]]  # part -> its parameters, by name


def fill_parts(
    state: Mapping[str, Tensor], source: Source, report: Report, load: Load
) -> tuple[list[str], dict[str, str]]:
    """Fills everything but the encoder, in place.

    Args:
        state: of the method, by its names in LUT.
        source: the file.
        report: of the file's encoder; what is taken here moves from its `dropped` to its `used`.
        load: as in `start.load`.

    Returns:
        A line for each part of the method, and each filled parameter -> the file's key, if it is a single one.

    Raises:
        ValueError: as in `_other_kinds`.
    """
    mine = _by_part({name: tensor for name, tensor in state.items() if not name.startswith(ENCODER)})
    if load == "encoder":
        return [f"  {', '.join(mine)}: as initialized, since start.load=encoder"], {}
    there, lines = _parts_in(source, report), []
    theirs = _by_part(
        {
            name: torch.cat([source.tensors[key] for key in keys]) if keys[1:] else source.tensors[keys[0]]
            for name, keys in there.items()
        }
    )
    others = _other_kinds(mine, theirs, source.path) if load == "all" else {}
    filled: dict[str, str] = {}
    for part, here in mine.items():
        given = theirs.get(part, {})
        problem = others.get(_group(part)) or _why_not(here, given)
        lines.append(f"  {part}: {problem or 'taken'}")
        for name in given if problem is None else ():
            here[name].copy_(given[name])
            report.used[name] = there[name]
            for key in there[name]:
                del report.dropped[key]
            filled |= {name: there[name][0]} if len(there[name]) == 1 else {}
    return lines, filled


def _parts_in(source: Source, report: Report) -> dict[str, tuple[str, ...]]:
    """What a file has besides its encoder: our names -> its keys, several if they make one matrix here."""
    if source.ours:
        bare = not any(key.startswith(ENCODER) for keys in report.used.values() for key in keys)
        prefix = METHOD if bare and source.weights == "online" else ""
        return {prefix + key: (key,) for key in report.dropped}
    decodes = any("decoder_pred." in key for key in report.dropped)
    mask_token = f"{METHOD}{'decoder' if decodes else 'predictor'}.mask_token"
    keys = {}
    for key in report.dropped:
        theirs = key.removeprefix("module.")
        for pattern, ours in (*_THEIRS, (r"mask_token", mask_token)):
            if re.fullmatch(pattern, theirs) and not key.endswith("num_batches_tracked"):  # ours does without
                keys[re.sub(pattern, ours, theirs)] = key
    joined: dict[str, tuple[str, ...]] = {}
    for name in sorted(keys, key=lambda name: "qkv".find(name.split(".")[-2])):
        ours = re.sub(r"\.attn\.[qkv]\.", ".attn.qkv.", name)
        joined[ours] = (*joined.get(ours, ()), keys[name])
    return joined


def _part(name: str) -> str:
    """`method.decoder.blocks.0.norm1.weight` -> `decoder.blocks`; `projector.0.weight` -> `projector`."""
    inner = re.fullmatch(r"method\.((?:predictor\.)?decoder\.\w+|\w+\.\w+|\w+)(?:\..+)?", name)
    return inner[1] if inner else f"LUT's {name.partition('.')[0]}"


def _why_not(here: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str | None:
    """Why a part cannot be taken; None if it can."""
    if not given:
        return "not in the file under any known name"
    for name in sorted(here.keys() | given.keys()):
        old, new = (tuple(tensors[name].shape) if name in tensors else None for tensors in (given, here))
        if old != new:
            words = [f"is {shape}" if shape is not None else "is missing" for shape in (old, new)]
            return f"does not fit: {name.removeprefix(METHOD)} {words[0]} in the file and {words[1]} here"
    return None


def _by_part(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        parts.setdefault(_part(name), {})[name] = tensor
    return parts


def _other_kinds(mine: _Parts, theirs: _Parts, path: Path) -> dict[str, str]:
    """Groups of parts that are not taken, because the file's group is of another kind -> why.

    Parts of one group share all but the last component of their names: `decoder`, `predictor.decoder` or LUT's
    `projector`. Groups are of the same kind if their parts have the same names.

    Raises:
        ValueError: a group of the same kind has another size in the file.
    """
    others = {}
    for group in dict.fromkeys(map(_group, mine)):
        here, given = (
            {part: parts[part] for part in parts if _group(part) == group and part.split(".")[-1] not in _REPLACEABLE}
            for parts in (mine, theirs)
        )
        problems = [f"{part} {why}" for part in here if part in given and (why := _why_not(here[part], given[part]))]
        if given and here.keys() != given.keys():
            others[group] = f"as initialized, since the file's {group} is of another kind ({', '.join(given)})"
        elif given and problems:
            raise ValueError(
                f"the {group} in {path} has {_described(given, group)}, but this run's has {_described(here, group)} "
                f"({problems[0]}): set {_keys(given, group)}, or start.load=encoder to load the encoder alone, or "
                f"start.load=fitting to load whatever else fits, too"
            )
    return others


def _group(part: str) -> str:
    return part.rpartition(".")[0] or part


def _size(parts: _Parts, group: str) -> tuple[int, int]:
    """Blocks and width of a decoder; 0 blocks for anything else."""
    widths = {
        int(found[1]): len(tensor)
        for part in parts.values()
        for name, tensor in part.items()
        if (found := re.search(rf"{group}\.blocks\.(\d+)\.norm2\.weight", name))
    }
    return len(widths), max(widths.values(), default=0)


def _described(parts: _Parts, group: str) -> str:
    """`8 blocks, 512 wide` for a decoder; the names of its parts for anything else."""
    blocks, width = _size(parts, group)
    return f"{blocks} {'block' if blocks == 1 else 'blocks'}, {width} wide" if blocks else ", ".join(parts)


def _keys(parts: _Parts, group: str) -> str:
    """The settings that give such a decoder."""
    blocks, width = _size(parts, group)
    if not blocks:
        return "method.* or lut.* to match it"
    return f"method.decoder_depth={blocks} method.decoder_embed_dim={width}"
