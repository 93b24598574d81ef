"""Folds what our encoder does not have, exactly, into parameters that it has.

All but `fold_batch_norm` change the parameters, by our names, in place, and note it in the report.
"""

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from downstream.checkpoints.find_spec import count_blocks, count_registers
from downstream.checkpoints.names import BIAS_TABLE, CROSSMAE, SHARED_BIAS
from downstream.checkpoints.report import Report
from pretrain.models.vit import CLASS_ADAPTER, fold_class_adapter

SCALE = ".gamma"  # of LayerScale


def _merge(
    state: dict[str, Tensor], report: Report, into: str, parts: list[str], how: Callable[..., Tensor], what: str
) -> None:
    """Replaces the named parts by `into`, which is made from them."""
    state[into] = how(*(state[part] for part in parts))
    keys = tuple(key for part in parts for key in report.used[part])
    for part in parts:
        if part != into:
            del state[part], report.used[part]
    report.used[into], report.folded[into] = keys, what


def fold_batch_norm(weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Folds a batch norm without parameters, as in MAE's linear probe, into the matrix and bias after it.

    W ((x - mean) / deviation) + b = (W / deviation) x + (b - W mean / deviation).
    """
    weight = weight * torch.rsqrt(variance + 1e-6)
    return weight, bias - weight @ mean


def supply_last_norm(state: dict[str, Tensor], report: Report) -> None:
    """Adds a last norm without a scale, as in our files of it: CrossMAE's inter-block attention trains none."""
    if CROSSMAE in report.dropped.values() and "norm.weight" not in state:
        width = state["patch_embed.proj.bias"]
        for name, value in (("norm.weight", torch.ones_like(width)), ("norm.bias", torch.zeros_like(width))):
            state[name], report.used[name] = value, ()
            report.folded[name] = "the file has no last norm: ones and zeros"


def join_projections(state: dict[str, Tensor], report: Report) -> None:
    """Joins transformers' matrices of queries, keys and values; BEiT's keys have no bias, which is a zero."""
    for q_name in [name for name in state if name.endswith(".attn.q.weight")]:
        at = q_name.removesuffix("q.weight")
        if at + "k.bias" not in state and at + "q.bias" in state:
            state[at + "q_bias"], report.used[at + "q_bias"] = state.pop(at + "q.bias"), report.used.pop(at + "q.bias")
            state[at + "v_bias"], report.used[at + "v_bias"] = state.pop(at + "v.bias"), report.used.pop(at + "v.bias")
        for kind in ("weight", "bias"):
            parts = [f"{at}{part}.{kind}" for part in "qkv"]
            if all(part in state for part in parts):
                what = "queries, keys and values joined"
                _merge(state, report, f"{at}qkv.{kind}", parts, lambda *three: torch.cat(three), what)


def join_biases(state: dict[str, Tensor], report: Report) -> None:
    """Joins the biases of queries and values in BEiT's and SimMIM's attention; keys have none, which is a zero."""
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


def share_bias(state: dict[str, Tensor], report: Report) -> None:
    """Gives each block a copy of the one table that all blocks share while BEiT and SimMIM pretrain."""
    if SHARED_BIAS in state:
        table, keys = state.pop(SHARED_BIAS), report.used.pop(SHARED_BIAS)
        for depth in range(count_blocks(state)):
            name = f"blocks.{depth}.{BIAS_TABLE}"
            state[name], report.used[name], report.folded[name] = table.clone(), keys, "one table shared by all blocks"


def fold_layer_scale(state: dict[str, Tensor], report: Report) -> None:
    """Folds LayerScale: gamma * (W x + b) = (gamma W) x + gamma b."""
    for gamma in [name for name in state if re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", name)]:
        matrix = gamma.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        scale = state.pop(gamma)
        (key,) = report.used.pop(gamma)
        for name in (matrix + ".weight", matrix + ".bias"):
            if name in state:
                state[name] = state[name] * (scale[:, None] if state[name].ndim == 2 else scale)
                report.used[name] += (key,)
                report.folded[name] = "LayerScale"


def fold_adapter(state: dict[str, Tensor], report: Report) -> None:
    """Folds the MLP that TEC's class token goes through in training: the result is a constant."""
    if CLASS_ADAPTER[0] in state:
        _merge(state, report, "cls_token", ["cls_token", *CLASS_ADAPTER], fold_class_adapter, "after its adapter's MLP")


def fold_positions(state: dict[str, Tensor], report: Report, grid: tuple[int, int] | None, keep_row: bool) -> None:
    """Adds a row of zeros to a table without one for the class token; moves a row that is not zero into the token.

    Rows of registers are moved into them, too: our tables have none.

    Args:
        grid: of the table, if it is known.
        keep_row: leaves the class token's row as it is.
    """
    table, registers = state["pos_embed"], count_registers(state)
    if grid and registers and table.shape[1] == grid[0] * grid[1] + 1 + registers:
        state["reg_token"] = state["reg_token"] + table[:, 1 : 1 + registers]
        state["pos_embed"] = table = torch.cat([table[:, :1], table[:, 1 + registers :]], dim=1)
        report.folded["reg_token"] = "their positions added to them"
        report.used["reg_token"] += report.used["pos_embed"]
    if grid and table.shape[1] == grid[0] * grid[1]:
        state["pos_embed"] = F.pad(table, (0, 0, 1, 0))
        report.folded["pos_embed"] = "no position for the class token: zeros"
    elif "cls_token" in state and table[:, 0].any() and not keep_row:
        state["cls_token"] = state["cls_token"] + table[:, :1]
        state["pos_embed"] = F.pad(table[:, 1:], (0, 0, 1, 0))
        report.folded["cls_token"] = "its position added to it, and zeros there"
        report.used["cls_token"] += report.used["pos_embed"]
