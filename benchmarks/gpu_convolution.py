"""Times kernels for PR-MIM's depth-wise convolution, the part of the fast variants that tensor cores cannot compute."""

import torch
from torch import Tensor

from benchmarks.gpu_session import Session, median_ms
from pretrain.models.aggregation import ConvAggregation, as_image, as_tokens
from pretrain.models.sdpa import set_deterministic

NAME = "PR-MIM's convolution"  # the section
GRID, KERNEL = (7, 7), 7  # a window's grid, and the side of the convolution
SHAPES = {"B": (1024, 768), "L": (512, 1024), "H": (256, 1280)}  # windows in the table's batches at 224, and width


class Contiguous(ConvAggregation):
    """The same on contiguous images, including the copies; `as_image` returns the channels-last layout."""

    def forward(self, tokens: Tensor, present: Tensor) -> Tensor:
        return as_tokens(self.conv(as_image(tokens, self.grid).contiguous()))


LAYOUTS = {"channels last": ConvAggregation, "contiguous": Contiguous}


def convolution(session: Session) -> None:
    """Measures milliseconds of the forward pass without autograd and of both passes, from tokens to tokens.

    It tries both layouts, with only cuDNN's deterministic kernels (as `train.deterministic` requests) and with all.
    """
    rows: dict[str, dict[str, float]] = {}
    for arch, (windows, dim) in SHAPES.items():
        windows = 2 if session.dry else windows
        tokens = torch.randn(windows, GRID[0] * GRID[1], dim, device=session.device, dtype=torch.bfloat16)
        for deterministic in (True, False):
            set_deterministic(deterministic)
            for layout, kind in LAYOUTS.items():
                name = f"{arch}, {layout}, {'deterministic' if deterministic else 'any'}"
                rows[name] = _times(kind(dim, GRID, KERNEL).to(session.device), tokens, session)
                session.say(f"{NAME}, {name}: " + ", ".join(f"{part} {ms:.3f} ms" for part, ms in rows[name].items()))
                session.keep("convolution", rows)
        best = min((name for name in rows if name.startswith(arch)), key=lambda name: rows[name]["both"])
        ours = rows[f"{arch}, channels last, deterministic"]["both"]
        session.say(f"{NAME}, {arch}: fastest is {best}, {ours / rows[best]['both']:.2f}x as fast as ours")


def _times(module: ConvAggregation, tokens: Tensor, session: Session) -> dict[str, float]:
    tokens = tokens.clone().requires_grad_()
    present = torch.ones_like(tokens[..., :1], dtype=torch.bool)
    upstream = torch.randn_like(tokens)

    def call() -> Tensor:
        with torch.autocast(session.device.type, torch.bfloat16):
            return module(tokens, present)

    def both() -> None:
        tokens.grad = None
        module.zero_grad()
        call().backward(upstream)

    repetitions = 2 if session.dry else 10
    with torch.no_grad():
        forward = median_ms(call, session.device, repetitions)
    return {"forward": forward, "both": median_ms(both, session.device, repetitions)}
