"""Translates the parameters of known checkpoints, whatever their names, into our encoder's.

`names.py` has the libraries' tables. Every key of a file is used, dropped for a reason given there, or an error.

What our encoder does not have is folded, exactly, into parameters that it has: LayerScale (DINOv2, BEiT) scales the
rows of the matrix before it, the class token's own position (DINO, timm) is added to the class token, and pixel
statistics other than ImageNet's (BEiT) change the kernel that embeds the pixels.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from data.pixel_format import IMAGENET, Pixels
from downstream.checkpoints.files import Source
from downstream.checkpoints.find_spec import find_spec
from downstream.checkpoints.fold import (
    SCALE,
    fold_adapter,
    fold_layer_scale,
    fold_positions,
    join_biases,
    join_projections,
    share_bias,
    supply_last_norm,
)
from downstream.checkpoints.names import (
    CLASSIFIER,
    DROPPED,
    LIBRARIES,
    REFUSED,
    SHARED_BIAS,
    Library,
    find_encoders,
    is_kept,
    match,
    rename,
)
from downstream.checkpoints.pixels import find_pixels, fold_pixels
from downstream.checkpoints.report import Report, group_problems
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.vit import CLASS_ADAPTER

_UNKNOWN = "unknown"
_HEAD_NORM = "the norm of a classifier"


@dataclass(frozen=True)
class EncoderWeights:
    """An encoder from a file, in the sizes of the file.

    Attributes:
        spec: what it is; method and epochs if the file says.
        size_known: whether the image size of `spec` is the file's; if the file gives none, that is 224 pixels, rounded
            down to whole patches.
        state: its parameters by our names, in fp32.
        report: what became of the file's keys.
        head: what a classifier has after the encoder, by timm's names, in fp32.
        head_keys: the file's keys for it.
        pool_norm: whether the encoder's last norm is the one after a classifier's pool, as there is no other.
    """

    spec: EncoderSpec
    size_known: bool
    state: dict[str, Tensor]
    report: Report
    head: dict[str, Tensor] = field(default_factory=dict)
    head_keys: dict[str, str] = field(default_factory=dict)
    pool_norm: bool = False


def translate(source: Source, pixels: Pixels | None = None, wanted: Collection[str] = ()) -> EncoderWeights:
    """Renames, drops and folds parameters; nothing is resized yet.

    Args:
        source: what was read.
        pixels: those that the weights were trained on; None: as `find_pixels` finds.
        wanted: parameters of the encoder to be filled, if it is to be pretrained. LayerScale, a bias that all blocks
            share, TEC's adapter and the class token's position are only folded if they are not among these.

    Raises:
        ValueError: no encoder or several in the file, keys that this project cannot explain or express, or a record
            that contradicts the tensors.
    """
    prefix, library = _find_encoder(source)
    report = Report(source.path, source.weights, library.title)
    state, head, head_keys, problems = _rename_keys(source, prefix, library, report)
    join_projections(state, report)
    join_biases(state, report)
    if SHARED_BIAS not in wanted:
        share_bias(state, report)
    if not any(name.endswith(SCALE) for name in wanted):
        fold_layer_scale(state, report)
    if CLASS_ADAPTER[0] not in wanted:
        fold_adapter(state, report)
    kept = [name for name in state if is_kept(name) or name in wanted]
    problems |= {key: _UNKNOWN for name, keys in report.used.items() if name not in kept for key in keys}
    if problems:
        raise ValueError(
            f"{source.path} ({library.title} names) has keys that this encoder cannot use:\n{group_problems(problems)}"
        )
    supply_last_norm(state, report)
    pool_norm = "norm.weight" not in state and "fc_norm.weight" in head
    if pool_norm:
        _move_pool_norm(state, head, head_keys, report)
    spec, size_known = find_spec(source, state)
    if spec.position == "relative" and "pos_embed" in state:
        del state["pos_embed"]
        (key,) = report.used.pop("pos_embed")
        report.dropped[key] = "a table that LoMaR's code never uses: its positions are in the relative tables"
    if "pos_embed" in state:
        fold_positions(state, report, spec.grid if size_known else None, "pos_embed" in wanted)
    theirs, report.pixels = find_pixels(source, state, pixels)
    if theirs != IMAGENET:
        fold_pixels(state, theirs)
        report.folded |= dict.fromkeys(("patch_embed.proj.weight", "patch_embed.proj.bias"), f"pixels with {theirs}")
    return EncoderWeights(spec, size_known, state, report, head, head_keys, pool_norm)


def _find_encoder(source: Source) -> tuple[str, Library]:
    """The prefix of the encoder's names, and the library that uses them."""
    found = find_encoders(source.tensors)
    if source.prefix in found:
        return source.prefix, found[source.prefix]
    if len(found) != 1:
        known = "; ".join(f"{library.title} {library.anchor}" for library in LIBRARIES)
        what = f"{len(found)} encoders ({', '.join(found)})" if found else f"no patch embedding ({known})"
        raise ValueError(f"{source.path} has {what}: it must hold one Vision Transformer")
    return next(iter(found.items()))


class _Renamed(NamedTuple):
    """A file's parameters by timm's names, in fp32; the keys of a classifier's, and the refused ones with reasons."""

    state: dict[str, Tensor]
    head: dict[str, Tensor]
    head_keys: dict[str, str]
    problems: dict[str, str]


def _rename_keys(source: Source, prefix: str, library: Library, report: Report) -> _Renamed:
    encoders = find_encoders(source.tensors)
    state, head, head_keys, problems = renamed = _Renamed({}, {}, {}, {})
    for key, tensor in source.tensors.items():
        owner = max((other for other in encoders if key.startswith(other)), key=len, default=None)
        name, reason = _explain(key, owner, prefix, library)
        if reason == _UNKNOWN and source.ours:
            reason = "the method's own"
        if CLASSIFIER.fullmatch(name) and reason is None:
            head[name], head_keys[name] = tensor.float(), key
            reason = _HEAD_NORM if name.startswith("fc_norm.") else match(name, DROPPED)
            if name in ("head.weight", "head.bias"):
                reason = f"a classifier of {len(tensor)} classes"
        refusal = match(name, REFUSED) if reason is None else None
        if reason == _UNKNOWN or refusal:
            problems[key] = refusal or _UNKNOWN
        elif reason := reason or match(name, DROPPED):
            report.dropped[key] = reason
        elif name in state:
            problems[key] = f"another key is also {name}"
        else:
            state[name] = tensor.float()
            report.used[name] = (key,)
    return renamed


def _explain(key: str, owner: str | None, prefix: str, library: Library) -> tuple[str, str | None]:
    """Our name for a key, and why it is not the encoder's, as far as its place in the file shows.

    Args:
        key: of the file.
        owner: the prefix of the encoder that it belongs to; None if there is none.
        prefix: of the encoder that is read.
        library: that its names come from.
    """
    if owner == prefix:
        return rename(library, key.removeprefix(prefix)), None
    if owner is not None:
        return key, f"another encoder of the file, {owner.rstrip('.') or 'the one without a prefix'}"
    parent = re.match(r"(.+\.)?(?=\w+\.$)", prefix)  # `model.` for `model.encoder.`
    plain = re.sub(r"^(module\.|_orig_mod\.)+", "", key.removeprefix((parent and parent[0]) or ""))
    name = rename(library, plain)
    if library.outside and name == plain:
        return name, match(name, library.outside) or _UNKNOWN
    return name, None


def _move_pool_norm(
    state: dict[str, Tensor], head: dict[str, Tensor], head_keys: dict[str, str], report: Report
) -> None:
    """Uses the norm after a classifier's pool as the encoder's last one."""
    for kind in ("weight", "bias"):
        name, key = f"norm.{kind}", head_keys[f"fc_norm.{kind}"]
        state[name], report.used[name] = head[f"fc_norm.{kind}"], (key,)
        report.folded[name] = (
            "the norm after a classifier's pool, here applied to every token: there is no other last norm"
        )
        del report.dropped[key]
