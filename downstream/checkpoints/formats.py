"""What the parameters of known checkpoints are called, and how they become our encoder's.

The formats do not use one name for two things, so one table serves all: ours, the LoMaR authors', MAE, LUT, SimMIM,
BEiT, DINO, DINOv2 and timm. Every key of a file is used, dropped for a reason given in the table, or an error.

Two things that our encoder does not have are folded, exactly, into parameters that it has: LayerScale (DINOv2, BEiT)
scales the rows of the matrix before it, and the class token's own position (DINO, timm) is always added to the class
token.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from downstream.checkpoints.files import Source
from downstream.checkpoints.find_spec import count_blocks, find_spec
from pretrain.models.encoder_spec import EncoderSpec

_ANCHOR = "patch_embed.proj.weight"

_KEPT = re.compile(
    r"cls_token|pos_embed|(patch_embed\.proj|norm)\.(weight|bias)"
    r"|blocks\.\d+\.((norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
    r"|attn\.rpe_k\.lookup_table_weight|attn\.rpe_bias\.relative_position_bias_table)"
)
_BIAS_TABLE = "attn.rpe_bias.relative_position_bias_table"

# A file's name -> ours.
_RENAMED = (
    (r"blocks\.\d+\.(\d+)\.(.+)", r"blocks.\1.\2"),  # DINOv2 in training: chunks of blocks, numbered throughout
    (r"blocks\.(\d+)\.attn\.relative_position_bias_table", rf"blocks.\1.{_BIAS_TABLE}"),
    (r"blocks\.(\d+)\.gamma_([12])", r"blocks.\1.ls\2.gamma"),
)

# Keys that are not the encoder's.
_DROPPED = (
    (r"decoder_(embed|pred|norm|blocks|pos_embed)\b.*", "MAE's decoder"),
    (r"encoder_pred\..+", "LoMaR's prediction head"),
    (r"lm_head\..+", "BEiT's token prediction head"),
    (r"mask_token", "the mask token of pretraining"),
    (r"(head|predictor)\.\d+\..+", "a projection head of LUT"),
    (r"(head|fc)\.(weight|bias)", "a classifier"),
    (r"(blocks\.\d+\.attn|rel_pos_bias)\.relative_position_index", "an index that is recomputed"),
)

# Keys without the encoder's prefix, in a file where it has one.
_OUTSIDE = (
    (r"decoder\..+", "the decoder of pretraining"),
    (r"(head|dino_head|ibot_head)\..+", "a self-distillation head or a classifier"),
    (r"(mask_token|predictor\..+)", "the predictor of pretraining"),
)

_REFUSED = (
    (r"register_tokens|reg_token|storage_tokens", "register tokens: this encoder has only a class token"),
    (r"dist_token|head_dist\..+", "a distillation token: this encoder has only a class token"),
    (r"fc_norm\..+", "a norm that was trained after average pooling: this encoder normalizes every token"),
    (r"blocks\.\d+\.mlp\.(w12|w3|w1|w2)\..+", "a gated MLP: this encoder's MLP has two matrices"),
    (r"blocks\.\d+\.attn\.(q_norm|k_norm)\..+", "norms of queries and keys, which this encoder does not have"),
    (r"norm_pre\..+", "a norm before the blocks, which this encoder does not have"),
    (r"rope\b.*", "rotary positions, which this encoder does not have"),
)


@dataclass(repr=False)
class Report:
    """What became of every key of a file; printed with a line for each reason.

    Attributes:
        path, weights: the file, and which of its weights were read; see `files.Source`.
        used: parameter of the encoder -> the file's keys that it was made of.
        folded, resized: parameter of the encoder -> what was done to it.
        dropped: key of the file -> why.
    """

    path: Path
    weights: str
    used: dict[str, tuple[str, ...]] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    resized: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.weights} weights)"]
        lines.append(f"  used     {len({key for keys in self.used.values() for key in keys})} keys")
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
    """

    spec: EncoderSpec
    size_known: bool
    state: dict[str, Tensor]
    report: Report


def translate(source: Source) -> EncoderWeights:
    """Renames, drops and folds; nothing is resized yet.

    Raises:
        ValueError: no encoder or several in the file, keys that this project cannot explain or express, or a record
            that contradicts the tensors.
    """
    report = Report(source.path, source.weights)
    state, problems = _rename_keys(source, report)
    _join_biases(state, report)
    _share_bias(state, report)
    _fold_layer_scale(state, report)
    problems |= {key: "unknown" for name, keys in report.used.items() if not _KEPT.fullmatch(name) for key in keys}
    if problems:
        raise ValueError(f"{source.path} has keys that this encoder cannot use:\n{_grouped(problems)}")
    spec, size_known = find_spec(source, state)
    if spec.position == "relative" and "pos_embed" in state:
        del state["pos_embed"]
        (key,) = report.used.pop("pos_embed")
        report.dropped[key] = "a table that LoMaR's code never adds: its positions are in the relative tables"
    if "pos_embed" in state and "cls_token" in state:
        _fold_class_position(state, report, spec.grid if size_known else None)
    return EncoderWeights(spec, size_known, state, report)


def _rename_keys(source: Source, report: Report) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters by our names, as far as they have one, in fp32; and the keys that are refused, with the reasons."""
    prefix = _find_prefix(source)
    wrapper = "module." if prefix.startswith("module.") else ""
    state: dict[str, Tensor] = {}
    problems: dict[str, str] = {}
    for key, tensor in source.tensors.items():
        if key.startswith(prefix):
            name = _rename(key.removeprefix(prefix))
            reason, refusal = _match(name, _DROPPED), _match(name, _REFUSED)
        else:
            name = key.removeprefix(wrapper)
            reason, refusal = _match(name, _OUTSIDE) or ("the method's own" if source.ours else None), None
        if reason == "a classifier":
            reason = f"a classifier of {len(tensor)} classes"
        if name.startswith("fc_norm.") and f"{prefix}norm.weight" in source.tensors:
            reason, refusal = "the norm of a classifier", None
        if reason:
            report.dropped[key] = reason
        elif refusal:
            problems[key] = refusal
        else:
            assert name not in state, f"two keys for {name}"
            state[name] = tensor.float()
            report.used[name] = (key,)
    return state, problems


def _find_prefix(source: Source) -> str:
    anchors = [key for key in source.tensors if key == _ANCHOR or key.endswith("." + _ANCHOR)]
    if len(anchors) != 1:
        found = f"{len(anchors)} encoders ({', '.join(anchors)})" if anchors else f"no key {_ANCHOR}"
        raise ValueError(f"{source.path} has {found}: it must hold one Vision Transformer")
    return anchors[0].removesuffix(_ANCHOR)


def _rename(name: str) -> str:
    for pattern, ours in _RENAMED:
        name = re.sub(rf"^(?:{pattern})$", ours, name)
    return name


def _match(name: str, table: Iterable[tuple[str, str]]) -> str | None:
    return next((reason for pattern, reason in table if re.fullmatch(pattern, name)), None)


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
            name = f"blocks.{depth}.{_BIAS_TABLE}"
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
    elif table[:, 0].any():
        state["cls_token"] = state["cls_token"] + table[:, :1]
        state["pos_embed"] = F.pad(table[:, 1:], (0, 0, 1, 0))
        report.folded["cls_token"] = "its position added to it, and zeros there"
        report.used["cls_token"] += report.used["pos_embed"]


def _any_block(key: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", key)
