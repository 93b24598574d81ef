"""Loads any known checkpoint into a method that is to be pretrained: the encoder, and whatever else fits.

    load_method(method, path, weights=None, load="all") -> LoadedMethod
    load_teacher(teacher, path, load="all") -> what became of it, in words

`method_parts.py` loads what a method has besides its encoder, by parts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from downstream.checkpoints.files import Source, Weights, read_source
from downstream.checkpoints.formats import EncoderWeights, Report, translate
from downstream.checkpoints.method_parts import ENCODER, METHOD, fill_parts
from downstream.checkpoints.weights import fill_encoder
from pretrain.methods.base import Method
from pretrain.methods.lut import LUT, TeacherModel
from pretrain.methods.targets.features import EncoderTeacher
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.vit import ViT, sincos_positions
from pretrain.sections import Load
from pretrain.trainer.checkpoint_layout import MANIFEST
from pretrain.trainer.run_folder import file_digest


@dataclass(frozen=True)
class LoadedMethod:
    """What became of a file.

    Attributes:
        path: the file, or the checkpoint's folder.
        report: in words, with a line for each part.
        taken: parameter of the method -> the file's key with exactly the same values: not folded, not resized.
    """

    path: Path
    report: str
    taken: dict[str, str]

    def record(self) -> dict[str, str]:
        """What a run records: the path, and the SHA-256 of the file, or of a checkpoint's manifest of checksums."""
        file = self.path / MANIFEST if self.path.is_dir() else self.path
        return {"path": str(self.path), "sha256": file_digest(file)}


def load_method(
    method: Method | LUT, path: Path | str, weights: Weights | None = None, load: Load = "all"
) -> LoadedMethod:
    """Fills a method that is not partitioned yet, at its own image and patch size.

    Args:
        method: its parameters are overwritten, part by part.
        path, weights: as in `load_encoder`.
        load: as in `start.load`.

    Raises:
        ValueError: as in `load_encoder`, or the encoder has another architecture or kind of position, or a decoder does
            not fit; the message names the key to change.
    """
    source = read_source(path, weights)
    report, note = _fill_encoder(method.encoder, source)
    changed = {*report.folded, *report.resized}
    taken = {ENCODER + name: keys[0] for name, keys in report.used.items() if name not in changed}
    state = method.state_dict() if isinstance(method, LUT) else _prefixed(METHOD, method.state_dict())
    lines, filled = fill_parts(state, source, report, load)
    taken |= filled
    if not isinstance(method, LUT):
        taken = {name.removeprefix(METHOD): key for name, key in taken.items()}
    return LoadedMethod(source.path, "\n".join([str(report), *note, *lines]), taken)


def load_teacher(teacher: TeacherModel | EncoderTeacher, path: Path | str, load: Load = "all") -> str:
    """Fills a moving average from the one in a file; if there is none, it remains a copy of the method.

    Args:
        teacher: fresh copies of the method's modules, after `load_method`.
        path, load: as in `load_method`.

    Returns:
        What it starts from, in words.

    Raises:
        ValueError: as in `load_method`.
    """
    try:
        source = read_source(path, "ema")
    except ValueError as error:
        parts = " and ".join(name for name, _ in teacher.named_children())
        return f"  teacher: a copy of the {parts} above ({error})"
    report, _ = _fill_encoder(teacher.encoder, source)
    state = {name: tensor for name, tensor in teacher.state_dict().items() if name.startswith("projector.")}
    lines, _ = fill_parts(state, source, report, load)
    return "\n".join([f"teacher: {report}", *lines])


def _fill_encoder(encoder: ViT, source: Source) -> tuple[Report, list[str]]:
    """Returns what became of every key, and a line about the table of positions, if there is something to say."""
    found = translate(source, wanted=encoder.state_dict().keys())
    path, spec, mine = found.report.path, found.spec, EncoderSpec.of(encoder)
    differ = [key for key in ("arch", "position", "registers") if getattr(spec, key) != getattr(mine, key)]
    if differ:
        keys = " and ".join(f"model.{key}={getattr(spec, key)}" for key in differ)
        raise ValueError(f"{path} does not match this run's encoder: set {keys}, or start from another file")
    try:
        return fill_encoder(encoder, found), _note_of_positions(encoder, found)
    except ValueError as error:
        raise ValueError(f"{error}; set model.* to match it, or start from another file") from None


def _note_of_positions(encoder: ViT, found: EncoderWeights) -> list[str]:
    """A line if the file's absolute table is of another kind than the encoder's: both are taken as they are."""
    table = found.state.get("pos_embed")
    if table is None:
        return []
    learned = isinstance(encoder.pos_embed, nn.Parameter)
    fixed = sincos_positions(encoder.arch.dim, *found.spec.grid)
    is_sincos = found.size_known and torch.allclose(table[0, -len(fixed) :], fixed, atol=1e-3)  # perhaps in half floats
    if is_sincos != learned:
        return []
    if learned:
        return ["  pos_embed: the file's is fixed (sin-cos), and model.position=learned trains it from there"]
    return [
        "  pos_embed: the file's is not sin-cos; it is loaded, and model.position=sincos keeps it fixed: "
        "model.position=learned would train it"
    ]


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}
