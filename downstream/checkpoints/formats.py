"""The parameters of known checkpoints, by whatever names, become our encoder's.

`names.py` has the libraries' tables. Every key of a file is used, dropped for a reason given there, or an error.

What our encoder does not have is folded, exactly, into parameters that it has: LayerScale (DINOv2, BEiT) scales the
rows of the matrix before it, the class token's own position (DINO, timm) is always added to the class token, and pixels
of other statistics than ImageNet's (BEiT) change the kernel that embeds them.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from downstream.checkpoints.files import Source
from downstream.checkpoints.find_spec import count_blocks, find_spec
from downstream.checkpoints.names import (
    BIAS_TABLE,
    CLASSIFIER,
    DROPPED,
    LIBRARIES,
    REFUSED,
    Library,
    find_encoders,
    is_kept,
    match,
    rename,
)
from downstream.checkpoints.pixels import IMAGENET, Pixels, find_pixels, fold_pixels
from pretrain.models.encoder_spec import EncoderSpec

_UNKNOWN = "unknown"
_HEAD_NORM = "the norm of a classifier"


@dataclass(repr=False)
class Report:
    """What became of every key of a file; printed with a line for each reason.

    Attributes:
        path, weights: the file, and which of its weights were read; see `files.Source`.
        library: whose names its keys are.
        pixels: what is known of the pixels that it was trained on.
        used: parameter of the encoder -> the file's keys that it was made of.
        folded, resized: parameter of the encoder -> what was done to it.
        dropped: key of the file -> why.
    """

    path: Path
    weights: str
    library: str = ""
    pixels: str = ""
    used: dict[str, tuple[str, ...]] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    resized: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.weights} weights)"]
        lines.append(f"  used     {len({key for keys in self.used.values() for key in keys})} keys")
        lines[-1] += f" under {self.library} names" if self.library else ""
        lines += [f"  pixels   {self.pixels}"] if self.pixels else []
        for title, reasons in (("folded", self.folded), ("resized", self.resized), ("dropped", self.dropped)):
            by_reason: dict[str, list[str]] = {}
            for key, reason in reasons.items():
                by_reason.setdefault(reason, []).append(key)
            for reason, keys in by_reason.items():
                names = list(dict.fromkeys(_any_block(key) for key in keys))
                shown = ", ".join(names[:3]) + (", ..." if names[3:] else "")
                lines.append(f"  {title:8} {len(keys)} ({shown}): {reason}")
        return "\n".join(lines)


@dataclass(frozen=True)
class EncoderWeights:
    """An encoder out of a file, in the sizes of the file.

    Attributes:
        spec: what it is; method and epochs where the file says.
        size_known: whether the image size of `spec` is the file's; where it tells none, that is 224 pixels, rounded
            down to whole patches.
        state: its parameters by our names, in fp32.
        report: what became of the file's keys.
        head: what a classifier has after the encoder, by timm's names, in fp32.
        pool_norm: whether the encoder's last norm is the one behind a classifier's pool, as there is no other.
    """

    spec: EncoderSpec
    size_known: bool
    state: dict[str, Tensor]
    report: Report
    head: dict[str, Tensor] = field(default_factory=dict)
    pool_norm: bool = False


def translate(source: Source, pixels: Pixels | None = None) -> EncoderWeights:
    """Renames, drops and folds; nothing is resized yet.

    Args:
        source: what was read.
        pixels: that the weights were trained on; None: as `find_pixels` finds.

    Raises:
        ValueError: no encoder or several in the file, keys that this project cannot explain or express, or a record
            that contradicts the tensors.
    """
    prefix, library = _find_encoder(source)
    report = Report(source.path, source.weights, library.title)
    state, head, problems = _rename_keys(source, prefix, library, report)
    _join_projections(state, report)
    _join_biases(state, report)
    _share_bias(state, report)
    _fold_layer_scale(state, report)
    problems |= {key: _UNKNOWN for name, keys in report.used.items() if not is_kept(name) for key in keys}
    if problems:
        raise ValueError(
            f"{source.path} ({library.title} names) has keys that this encoder cannot use:\n{_grouped(problems)}"
        )
    pool_norm = _move_pool_norm(state, head, report)
    spec, size_known = find_spec(source, state)
    if spec.position == "relative" and "pos_embed" in state:
        del state["pos_embed"]
        (key,) = report.used.pop("pos_embed")
        report.dropped[key] = "a table that LoMaR's code never adds: its positions are in the relative tables"
    if "pos_embed" in state:
        _fold_class_position(state, report, spec.grid if size_known else None)
    theirs, report.pixels = find_pixels(source, state, pixels)
    if theirs != IMAGENET:
        fold_pixels(state, theirs)
        report.folded |= dict.fromkeys(("patch_embed.proj.weight", "patch_embed.proj.bias"), f"pixels of {theirs}")
    return EncoderWeights(spec, size_known, state, report, head, pool_norm)


def _find_encoder(source: Source) -> tuple[str, Library]:
    """The prefix of the encoder's names, and whose names they are."""
    found = find_encoders(source.tensors)
    if source.prefix in found:
        return source.prefix, found[source.prefix]
    if len(found) != 1:
        known = "; ".join(f"{library.title} {library.anchor}" for library in LIBRARIES)
        what = f"{len(found)} encoders ({', '.join(found)})" if found else f"no key that embeds patches ({known})"
        raise ValueError(f"{source.path} has {what}: it must hold one Vision Transformer")
    return next(iter(found.items()))


def _rename_keys(
    source: Source, prefix: str, library: Library, report: Report
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """Parameters by our names, as far as they have one, those of a classifier, and why other keys are refused."""
    encoders = find_encoders(source.tensors)
    state: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    problems: dict[str, str] = {}
    for key, tensor in source.tensors.items():
        owner = max((other for other in encoders if key.startswith(other)), key=len, default=None)
        name, reason = _explain(key, owner, prefix, library)
        if reason == _UNKNOWN and source.ours:
            reason = "the method's own"
        if CLASSIFIER.fullmatch(name) and reason is None:
            head[name] = tensor.float()
            of_probe = match(name, DROPPED[-3:-2])
            reason = of_probe or (_HEAD_NORM if "norm" in name else f"a classifier of {len(tensor)} classes")
        refusal = match(name, REFUSED) if reason is None else None
        if reason == _UNKNOWN or refusal:
            problems[key] = refusal or _UNKNOWN
        elif reason := reason or match(name, DROPPED):
            report.dropped[key] = reason
        else:
            assert name not in state, f"two keys for {name}"
            state[name] = tensor.float()
            report.used[name] = (key,)
    return state, head, problems


def _explain(key: str, owner: str | None, prefix: str, library: Library) -> tuple[str, str | None]:
    """Our name of a key, and why it is not the encoder's, as far as its place in the file tells.

    Args:
        key: of the file.
        owner: the prefix of the encoder that it belongs to; None where that is none.
        prefix: of the encoder that is read.
        library: whose names it has.
    """
    if owner == prefix:
        return rename(library, key.removeprefix(prefix)), None
    if owner is not None:
        return key, f"another encoder of the file, {owner.rstrip('.') or 'the one without a prefix'}"
    plain = re.sub(r"^(module\.|_orig_mod\.)+", "", key)
    name = rename(library, plain)
    if library.outside and name == plain:
        return name, match(name, library.outside) or _UNKNOWN
    return name, None


def _move_pool_norm(state: dict[str, Tensor], head: dict[str, Tensor], report: Report) -> bool:
    """Takes the norm behind a classifier's pool as the encoder's last one, where there is no other."""
    if "norm.weight" in state or "fc_norm.weight" not in head:
        return False
    for kind in ("weight", "bias"):
        name = f"norm.{kind}"
        state[name] = head[f"fc_norm.{kind}"]
        (key,) = (key for key, reason in report.dropped.items() if reason == _HEAD_NORM and key.endswith(kind))
        report.used[name] = (key,)
        report.folded[name] = "the norm behind a classifier's pool, here of every token: there is no other last norm"
        del report.dropped[key]
    return True


def _grouped(problems: dict[str, str]) -> str:
    groups = {(_any_block(key), why): None for key, why in problems.items()}
    return "\n".join(f"  {key}: {why}" for key, why in groups)


def _merge(
    state: dict[str, Tensor], report: Report, into: str, parts: list[str], how: Callable[..., Tensor], what: str
) -> None:
    """Makes `into` out of the named parts, which are then gone."""
    state[into] = how(*(state[part] for part in parts))
    keys = tuple(key for part in parts for key in report.used[part])
    for part in parts:
        if part != into:
            del state[part], report.used[part]
    report.used[into], report.folded[into] = keys, what


def _join_projections(state: dict[str, Tensor], report: Report) -> None:
    """Transformers has three matrices for queries, keys and values; of BEiT's, keys have no bias, which is a zero."""
    for q_name in [name for name in state if name.endswith(".attn.q.weight")]:
        at = q_name.removesuffix("q.weight")
        if at + "k.bias" not in state and at + "q.bias" in state:
            state[at + "q_bias"], report.used[at + "q_bias"] = state.pop(at + "q.bias"), report.used.pop(at + "q.bias")
            state[at + "v_bias"], report.used[at + "v_bias"] = state.pop(at + "v.bias"), report.used.pop(at + "v.bias")
        for kind in ("weight", "bias"):
            parts = [f"{at}{part}.{kind}" for part in "qkv"]
            if all(part in state for part in parts):
                _merge(state, report, f"{at}qkv.{kind}", parts, lambda *three: torch.cat(three), "three joined")


def _join_biases(state: dict[str, Tensor], report: Report) -> None:
    """BEiT's and SimMIM's attention has a bias on queries and values; keys have none, which is a zero."""
    for q_name in [name for name in state if name.endswith(".attn.q_bias")]:
        at = q_name.removesuffix("q_bias")
        if at + "v_bias" in state:
            _merge(
                state,
                report,
                at + "qkv.bias",
                [q_name, at + "v_bias"],
                lambda q, v: torch.cat([q, torch.zeros_like(q), v]),
                "biases of queries and values, and zeros for the keys",
            )


def _share_bias(state: dict[str, Tensor], report: Report) -> None:
    """While BEiT and SimMIM pretrain, all blocks share one table."""
    shared = "rel_pos_bias.relative_position_bias_table"
    if shared in state:
        table, keys = state.pop(shared), report.used.pop(shared)
        for depth in range(count_blocks(state)):
            name = f"blocks.{depth}.{BIAS_TABLE}"
            state[name], report.used[name], report.folded[name] = table.clone(), keys, "one table shared by all blocks"


def _fold_layer_scale(state: dict[str, Tensor], report: Report) -> None:
    """gamma * (W x + b) = (gamma W) x + gamma b."""
    for gamma in [name for name in state if re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", name)]:
        matrix = gamma.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        scale = state.pop(gamma)
        (key,) = report.used.pop(gamma)
        for name in (matrix + ".weight", matrix + ".bias"):
            if name in state:
                state[name] = state[name] * (scale[:, None] if state[name].ndim == 2 else scale)
                report.used[name] += (key,)
                report.folded[name] = "LayerScale"


def _fold_class_position(state: dict[str, Tensor], report: Report, grid: tuple[int, int] | None) -> None:
    """A table without a row for the class token gets a row of zeros; a row that is not zero goes into the token."""
    table = state["pos_embed"]
    if grid and table.shape[1] == grid[0] * grid[1]:
        state["pos_embed"] = F.pad(table, (0, 0, 1, 0))
        report.folded["pos_embed"] = "no position for the class token: zeros"
    elif "cls_token" in state and table[:, 0].any():
        state["cls_token"] = state["cls_token"] + table[:, :1]
        state["pos_embed"] = F.pad(table[:, 1:], (0, 0, 1, 0))
        report.folded["cls_token"] = "its position added to it, and zeros there"
        report.used["cls_token"] += report.used["pos_embed"]


def _any_block(key: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", key)
