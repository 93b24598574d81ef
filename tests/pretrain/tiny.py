"""Small models and batches for the tests of this folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.methods import targets
from pretrain.methods.lomar import LoMaR
from pretrain.methods.partial import Partial
from pretrain.models import vit

TINY = vit.Arch(dim=16, depth=2, heads=2)


def tiny_vit(
    side: int, grid: tuple[int, int], relative: bool = True, checkpoint_blocks: bool = False, arch: vit.Arch = TINY
) -> vit.ViT:
    with patch.dict(vit.ARCHS, vit_tiny=arch):
        return vit.ViT("vit_tiny", side, grid, relative, checkpoint_blocks)


def tiny_lomar(
    grid: tuple[int, int] = (4, 6),
    side: int = 2,
    relative: bool = True,
    checkpoint_blocks: bool = False,
    arch: vit.Arch = TINY,
    partial: Partial | None = None,
    **config: Any,
) -> LoMaR:
    """Freshly initialised; `config` over three windows of 3x3 patches, five of them masked."""
    torch.manual_seed(0)
    keys = {"windows": 3, "window": 3, "mask_ratio": 0.6} | config
    return LoMaR(LoMaR.Config(**keys), tiny_vit(side, grid, relative, checkpoint_blocks, arch), partial)


def randomize(model: torch.nn.Module) -> None:
    """No parameter keeps a special value: biases and relative tables start at zero, norms at one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)


def random_images(model: LoMaR, count: int = 2) -> Tensor:
    rows, cols = model.encoder.grid
    side = model.encoder.patch
    return torch.randint(
        0, 256, (count, rows * side, cols * side, 3), generator=torch.Generator().manual_seed(2)
    ).byte()


def random_view(model: LoMaR, count: int = 2, seed: int = 3) -> dict[str, Tensor]:
    draw = model.view()
    samples = [draw(np.random.default_rng((seed, i))) for i in range(count)]
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}


@contextmanager
def everything_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it `pretrain` computes in float64, so a comparison can be far stricter than fp32's rounding."""
    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "float", Tensor.double)
        targets._pixel_statistics.cache_clear()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)
            targets._pixel_statistics.cache_clear()
