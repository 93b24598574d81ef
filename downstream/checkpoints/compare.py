"""Whether two models compute the same features, in float64.

In fp32, features of the same parameters differ by up to 2e-5 (320 times fp32's rounding, 6e-8) between processors and
libraries, which sum in different orders, so a bound that holds everywhere hides small mistakes. In float64 the same 320
roundings are 4e-14 (measured: 5e-15 for a ViT-L), while a parameter tensor that differs in the last fp32 bit of its
entries changes the features by 1e-8. `FLOAT64_TOLERANCE` lies in between: it never refuses a correct model, whatever
the processor, and it detects a tensor that differs.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

FLOAT64_TOLERANCE = 1e-10  # relative to the largest feature

_Module = TypeVar("_Module", bound=nn.Module)


def max_difference(first: Tensor, second: Tensor) -> float:
    """The largest difference of two features of the same shape, relative to the largest feature; NaN if one is NaN."""
    assert first.shape == second.shape, (first.shape, second.shape)
    largest = torch.maximum(first.abs().max(), second.abs().max())
    return float((first - second).abs().max() / largest.clamp(min=torch.finfo(largest.dtype).tiny))


def float64_copy(module: _Module, memo: dict[int, object] | None = None) -> _Module:
    """A copy in float64, on the CPU, in eval mode.

    Args:
        module: left unchanged.
        memo: for `copy.deepcopy`: {id(thing): None} leaves a thing out of the copy.
    """
    return copy.deepcopy(module, memo).cpu().double().eval()


def random_images(height: int, width: int, channels: int = 3) -> Tensor:
    """(2, channels, height, width) standard normal float64, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64)
