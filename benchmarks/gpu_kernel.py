"""Tests the window-attention kernel: is it correct, which launch is best, is it faster than torch's attention?"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from benchmarks.gpu_session import Session, free_memory, graphed_ms
from pretrain.models import window_attention
from pretrain.models.attention import RelativeKey, attend
from pretrain.models.relative_position import grid_buckets, pair_buckets
from pretrain.models.sdpa import set_deterministic
from pretrain.models.window_attention import Launch, window_tokens

SIZE = 7  # patches along a side of a window
RIGHT = "kernel: right?"  # the section
RESERVE = 30  # seconds that a sweep leaves for other sections
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # relative, against float64 from the same inputs


@dataclass(frozen=True)
class Shape:
    """Windows of one layer in one step, with the table's batches.

    Attributes:
        patches: per window, besides the class token; all 49 are in raster order.
    """

    windows: int
    patches: int
    heads: int
    channels: int

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """qkv (G, L, 3, H, C), table (C, 50), and the patches (G, T), or None for all."""
        torch.manual_seed(0)
        G, L = self.windows, 1 + self.patches
        qkv = torch.randn(G, L, 3, self.heads, self.channels, device=device).to(dtype)
        table = 0.3 * torch.randn(self.channels, 50, device=device)
        everything = self.patches == SIZE * SIZE
        some = torch.rand(G, SIZE * SIZE, device=device).argsort(1)[:, : self.patches]
        return qkv, table, None if everything else some


SHAPES = {
    "B, all 50 tokens": Shape(1024, 49, 12, 64),
    "B, PR-MIM's 26": Shape(1024, 25, 12, 64),
    "B, visible 11": Shape(1024, 10, 12, 64),
    "L, all 50 tokens": Shape(512, 49, 16, 64),
    "H, all 50 tokens": Shape(256, 49, 16, 80),
}
LAUNCHES = [Launch(heads, warps, stages) for heads in (1, 2, 4, 12, 16) for warps in (4, 8) for stages in (1, 2)]


def reference(qkv: Tensor, table: Tensor, patches: Tensor | None) -> Tensor:
    """(G, L, H, C), computed with gathers and whole maps, in the dtype of the inputs."""
    tokens = torch.arange(1 + SIZE * SIZE, device=qkv.device)[None]
    if patches is not None:
        tokens = F.pad(1 + patches, (1, 0))
    ids = grid_buckets(SIZE, SIZE).to(qkv.device)[tokens[:, :, None], tokens[:, None, :]]
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    terms = q @ table
    bias = terms.gather(3, ids[:, None].expand(*terms.shape[:3], -1))
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias
    return (logits.softmax(-1) @ v).transpose(1, 2)


def by_kernel(qkv: Tensor, table: Tensor, patches: Tensor | None) -> Callable[[], Tensor]:
    tokens = window_tokens(SIZE, patches, qkv.device)
    return lambda: window_attention.window_attention(qkv, table, tokens)


def by_torch(qkv: Tensor, table: Tensor, patches: Tensor | None) -> Callable[[], Tensor]:
    """What the project does without the kernel: a bias for all logits, and torch's attention.

    A step computes the buckets once for all blocks, so they are not part of the call.
    """
    key, buckets = RelativeKey(qkv.shape[-1]), grid_buckets(SIZE, SIZE).to(qkv.device)
    with torch.autocast(qkv.device.type, qkv.dtype):
        position = buckets if patches is None else pair_buckets(buckets, patches)

    def call() -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        with torch.autocast(qkv.device.type, qkv.dtype):
            bias = functional_call(key, {"lookup_table_weight": table[None]}, (q, position))
            return attend(q, k, v, bias).transpose(1, 2)

    return call


def right(session: Session) -> None:
    """Checks outputs and gradients against float64, and that two runs have equal bits (dry: of torch's attention)."""
    make = by_torch if session.dry else by_kernel
    set_deterministic(True)
    rows = session.table("kernel_right")
    cases = [(name, torch.bfloat16) for name in SHAPES] + [("B, all 50 tokens", torch.float16)]
    for name, dtype in cases:
        few = replace(SHAPES[name], windows=2 if session.dry else 64)
        row = _errors(make, *few.inputs(session.device, dtype))
        errors = {part: error for part, error in row.items() if part != "same bits twice"}
        row["ok"] = row["same bits twice"] and all(error < TOLERANCE[dtype] for error in errors.values())
        rows[f"{name}, {dtype}"] = row
        session.keep("kernel_right", rows)
        numbers = ", ".join(f"{part} {error:.1e}" for part, error in errors.items())
        session.say(f"{name}, {dtype}: {numbers}; same bits twice: {row['same bits twice']}; ok: {row['ok']}")
    wrong = [name for name, row in rows.items() if not row["ok"]]
    if wrong:
        raise ArithmeticError(f"wrong, or different bits the second time: {wrong}")


def is_wrong(session: Session) -> bool:
    """Whether `right` found an error, or failed."""
    return session.results["sections"].get(RIGHT, "").startswith("error")


def _errors(make: Callable, qkv: Tensor, table: Tensor, patches: Tensor | None) -> dict[str, Any]:
    results = []
    for _ in range(2):
        x, t = qkv.clone().requires_grad_(), table.clone().requires_grad_()
        out = make(x, t, patches)()
        upstream = torch.ones_like(out) * torch.arange(out.shape[-1], device=out.device).remainder(7).sub(3)
        out.backward(upstream)
        results.append((out.detach(), x.grad, t.grad))
    # The kernel reads the table in the dtype of the products.
    x, t = qkv.double().requires_grad_(), table.to(qkv.dtype).double().requires_grad_()
    out = reference(x, t, patches)
    out.backward(upstream.double())
    exact = (out.detach(), x.grad, t.grad)
    errors = {
        part: float((ours.double() - true).norm() / true.norm())
        for part, ours, true in zip(("out", "dqkv", "dtable"), results[0], exact, strict=True)
    }
    same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return {**errors, "same bits twice": same}


def launched(direction: str, launch: Launch) -> AbstractContextManager:
    """A context in which the kernel of one direction uses another launch than the project's."""
    chosen = window_attention.choose_launch

    def choose(backward: bool, *rest: Any) -> Launch:
        return launch if backward == (direction == "backward") else chosen(backward, *rest)

    return patch.object(window_attention, "choose_launch", choose)


def against_torch(name: str) -> Callable[[Session], None]:
    """Times one layer's attention at a key of `SHAPES`, with the kernel and with torch, and reports which is faster."""

    def section(session: Session) -> None:
        shape = replace(SHAPES[name], windows=4) if session.dry else SHAPES[name]
        inputs = shape.inputs(session.device, torch.bfloat16)
        rows: dict[str, Any] = {}
        for label, make, deterministic in (
            ("kernel", by_kernel, True),
            ("torch, deterministic", by_torch, True),
            ("torch, fastest", by_torch, False),
        ):
            if session.dry and make is by_kernel:
                continue  # the kernel needs a GPU
            set_deterministic(deterministic)
            rows[label] = _times(make, *inputs, session)
            session.say(f"{name}, {label}: " + ", ".join(f"{part} {ms:.3f} ms" for part, ms in rows[label].items()))
        if "kernel" in rows:
            best = min(rows[label]["both"] for label in rows if label != "kernel")
            wins = rows["kernel"]["both"] < best
            rows["faster"] = "kernel" if wins else "torch; the kernel should not be the default"
            session.say(f"{name}: faster is {rows['faster']} ({best / rows['kernel']['both']:.2f}x)")
        session.keep("kernel_against_torch", session.table("kernel_against_torch") | {name: rows})

    return section


def _times(make: Callable, qkv: Tensor, table: Tensor, patches: Tensor | None, session: Session) -> dict[str, float]:
    """Milliseconds of the forward pass without autograd, and of both passes."""
    qkv, table = qkv.requires_grad_(), table.requires_grad_()
    call = make(qkv, table, patches)
    with torch.no_grad():
        forward = graphed_ms(call, session.device)
        upstream = torch.randn_like(call())
    both = graphed_ms(lambda: torch.autograd.grad(call(), (qkv, table), upstream), session.device)
    return {"forward": forward, "both": both}


def sweep(name: str) -> Callable[[Session], None]:
    """Times the kernel at a key of `SHAPES` with every launch; the fastest is only reported, not adopted."""

    def section(session: Session) -> None:
        if session.dry:
            return session.say("the kernel runs only on GPUs")
        inputs = SHAPES[name].inputs(session.device, torch.bfloat16)
        rows: dict[str, Any] = {}
        for direction in ("forward", "backward"):
            for launch in LAUNCHES:
                label = f"{direction}: {launch.heads} heads, {launch.warps} warps, {launch.stages} stages"
                if SHAPES[name].heads % launch.heads:
                    continue
                if session.left() < RESERVE:
                    rows[label] = "left out: no time"
                    continue
                rows[label] = _launch_times(by_kernel, inputs, session, direction, launch)
                session.say(f"{name}, {label}: {rows[label]}")
                session.keep("kernel_sweep", session.table("kernel_sweep") | {name: rows})
        measured = {label: ms for label, ms in rows.items() if isinstance(ms, float)}
        for direction in ("forward", "backward"):
            best = min((label for label in measured if label.startswith(direction)), key=measured.__getitem__)
            session.say(f"{name}: best {best}: {measured[best]} ms")

    return section


def _launch_times(
    make: Callable, inputs: tuple[Tensor, Tensor, Tensor | None], session: Session, direction: str, launch: Launch
) -> float | str:
    """Milliseconds of the forward pass alone, or of both passes, where only the backward launch differs."""
    from triton.errors import TritonError

    try:
        with launched(direction, launch):
            times = _times(make, *inputs, session)
    except TritonError as error:  # for example too much shared memory; this is a result of the sweep
        free_memory()
        return f"{type(error).__name__}: {error}"[:200]
    return round(times["forward" if direction == "forward" else "both"], 4)
