"""Loads any known checkpoint into a method that is to be pretrained: the encoder, and what else the file has and fits.

    load_method(method, path, weights=None) -> LoadedMethod
    load_teacher(teacher, path) -> what became of it, in words

What a method has besides its encoder is loaded by parts, called by their names in the method: `decoder.blocks`,
`predictor.head`, or LUT's `projector`. A part is taken whole or not at all.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from downstream.checkpoints.files import Source, Weights, read_source
from downstream.checkpoints.formats import Report, translate
from downstream.checkpoints.weights import fill_encoder
from pretrain.methods.base import Method
from pretrain.methods.lut import LUT, TeacherModel
from pretrain.methods.targets.features import EncoderTeacher
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.vit import ViT
from pretrain.trainer.checkpoint_layout import MANIFEST
from pretrain.trainer.run_folder import file_digest

# Of the parameters' names below, where a method is in a LUT, whose own heads have none; a method alone is named alike.
_METHOD = "method."
_ENCODER = "method.encoder."

_LAYER = r"decoder\.decoder_layers\.(\d+)\."
# Keys of other projects that are not their encoder's -> ours.
_THEIRS = (
    (r"decoder_(embed|blocks|norm|pred)\.(.+)", r"method.decoder.\1.\2"),  # MAE, LUT
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


@dataclass(frozen=True)
class LoadedMethod:
    """What became of a file.

    Attributes:
        path: the file, or the checkpoint's folder.
        report: in words, with a line for each part.
        taken: parameter of the method -> the file's key with the very same values: not folded, not resized.
    """

    path: Path
    report: str
    taken: dict[str, str]

    def record(self) -> dict[str, str]:
        """What a run records of it: the path and the SHA-256, of a checkpoint's manifest, which has all checksums."""
        file = self.path / MANIFEST if self.path.is_dir() else self.path
        return {"path": str(self.path), "sha256": file_digest(file)}


def load_method(method: Method | LUT, path: Path | str, weights: Weights | None = None) -> LoadedMethod:
    """Fills a method that is not partitioned yet, at its own image and patch size.

    Args:
        method: whose parameters are overwritten, part by part.
        path, weights: as of `load_encoder`.

    Raises:
        ValueError: as of `load_encoder`, and where the encoder is of another architecture or kind of position; the
            message names the key to change.
    """
    source = read_source(path, weights)
    report = _fill_encoder(method.encoder, source)
    changed = {*report.folded, *report.resized}
    taken = {_ENCODER + name: keys[0] for name, keys in report.used.items() if name not in changed}
    state = method.state_dict() if isinstance(method, LUT) else _prefixed(_METHOD, method.state_dict())
    lines, filled = _fill_parts(state, source, report)
    taken |= filled
    if not isinstance(method, LUT):
        taken = {name.removeprefix(_METHOD): key for name, key in taken.items()}
    return LoadedMethod(source.path, "\n".join([str(report), *lines]), taken)


def load_teacher(teacher: TeacherModel | EncoderTeacher, path: Path | str) -> str:
    """Fills a moving average with the one that a file holds; without one, it stays the copy that it is.

    Args:
        teacher: fresh copies of the method's modules, after `load_method`.
        path: as of `load_encoder`.

    Returns:
        What it starts from, in words.

    Raises:
        ValueError: as `load_method`.
    """
    try:
        source = read_source(path, "ema")
    except ValueError as error:
        parts = " and ".join(name for name, _ in teacher.named_children())
        return f"  teacher: a copy of the {parts} above ({error})"
    report = _fill_encoder(teacher.encoder, source)
    state = {name: tensor for name, tensor in teacher.state_dict().items() if name.startswith("projector.")}
    lines, _ = _fill_parts(state, source, report)
    return "\n".join([f"teacher: {report}", *lines])


def _fill_encoder(encoder: ViT, source: Source) -> Report:
    found = translate(source, wanted=encoder.state_dict().keys())
    path, spec, mine = found.report.path, found.spec, EncoderSpec.of(encoder)
    differ = [key for key in ("arch", "position", "registers") if getattr(spec, key) != getattr(mine, key)]
    if differ:
        keys = " and ".join(f"model.{key}={getattr(spec, key)}" for key in differ)
        raise ValueError(f"{path} is another encoder: set {keys}, or start from another file")
    adapter, encoder.class_adapter = encoder.class_adapter, None  # TEC's: of no file, it stays as it is
    try:
        return fill_encoder(encoder, found)
    except ValueError as error:
        raise ValueError(f"{error}; set model.* to match it, or start from another file") from None
    finally:
        encoder.class_adapter = adapter


def _fill_parts(state: Mapping[str, Tensor], source: Source, report: Report) -> tuple[list[str], dict[str, str]]:
    """Fills whatever is not the encoder's, in place.

    Args:
        state: the method's, by the names of one in a LUT.
        source: the file.
        report: of the file's encoder; what is taken here moves from its `dropped` to its `used`.

    Returns:
        A line for each part of the method, and the parameters that were filled -> the file's key, where it is one.
    """
    there, lines = _parts_in(source, report), []
    filled: dict[str, str] = {}
    for part in dict.fromkeys(_part(name) for name in state if not name.startswith(_ENCODER)):
        here = {name: tensor for name, tensor in state.items() if _part(name) == part}
        given = {
            name: torch.cat([source.tensors[key] for key in keys]) if keys[1:] else source.tensors[keys[0]]
            for name, keys in there.items()
            if _part(name) == part
        }
        problem = _why_not(here, given)
        lines.append(f"  {part}: {problem or 'taken'}")
        for name in given if problem is None else ():
            here[name].copy_(given[name])
            report.used[name] = there[name]
            for key in there[name]:
                del report.dropped[key]
            filled |= {name: there[name][0]} if len(there[name]) == 1 else {}
    return lines, filled


def _parts_in(source: Source, report: Report) -> dict[str, tuple[str, ...]]:
    """What a file has besides its encoder: our names -> its keys, several where we have one matrix of them."""
    if source.ours:
        bare = not any(key.startswith(_ENCODER) for keys in report.used.values() for key in keys)
        prefix = _METHOD if bare and source.weights == "online" else ""
        return {prefix + key: (key,) for key in report.dropped}
    decodes = any("decoder_embed." in key for key in report.dropped)
    mask_token = f"{_METHOD}{'decoder' if decodes else 'predictor'}.mask_token"
    keys = {}
    for key in report.dropped:
        theirs = key.removeprefix("module.")
        for pattern, ours in (*_THEIRS, (r"mask_token", mask_token)):
            if re.fullmatch(pattern, theirs) and not key.endswith("num_batches_tracked"):  # which ours does without
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
    """Why a part cannot be taken, if it cannot."""
    if not given:
        return "not in the file, by any name known here"
    for name in sorted(here.keys() | given.keys()):
        old, new = (tuple(tensors[name].shape) if name in tensors else None for tensors in (given, here))
        if old != new:
            words = [f"is {shape}" if shape is not None else "is missing" for shape in (old, new)]
            return f"does not fit: {name.removeprefix(_METHOD)} {words[0]} in the file and {words[1]} here"
    return None


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}
