"""Tests of the MLP that recomputes its activation: it matches timm's and needs less memory."""

import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from timm.layers import Mlp as TimmMlp
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.saved import saved_storages
from downstream.dense.backbone.mlp import Mlp

Forward = Callable[[Tensor], Tensor]
recomputed = partial(checkpoint, use_reentrant=False)


def build(kind: type[Mlp] | type[TimmMlp], dim: int = 16, hidden: int = 64) -> Mlp | TimmMlp:
    torch.manual_seed(0)
    return kind(dim, hidden)


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1), dtype=dtype)


def results(mlp: Mlp | TimmMlp, forward: Forward, bf16: bool) -> list[Tensor]:
    """Return the output and the gradients of the input and of each parameter."""
    x = tokens().requires_grad_() if bf16 else tokens(torch.float64).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = forward(x)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return [out, x.grad, *(parameter.grad for parameter in mlp.parameters())]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_matches_timm(bf16: bool, recompute: bool):
    dtype = torch.float32 if bf16 else torch.float64
    ours, reference = build(Mlp).to(dtype), build(TimmMlp).to(dtype)
    assert ours.state_dict().keys() == reference.state_dict().keys()
    found = results(ours, partial(recomputed, ours) if recompute else ours, bf16)
    for a, b in zip(found, results(reference, reference, bf16), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_match_finite_differences():
    mlp = build(Mlp, 4, 6).double()
    x = tokens(torch.float64)[..., :4].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: mlp(x), (x, *mlp.parameters()))


@pytest.mark.parametrize(("kind", "kept"), [(Mlp, 1), (TimmMlp, 2)])
def test_saves_one_hidden_activation_and_weight_copy_where_timm_saves_two(kind: type[Mlp] | type[TimmMlp], kept: int):
    mlp = build(kind)
    with torch.autocast("cpu", torch.bfloat16), saved_storages(mlp) as storages:
        out = mlp(tokens().requires_grad_())
    sizes = list(storages.values())
    assert sizes.count(3 * 5 * 64 * 2) == kept
    assert sizes.count(16 * 64 * 2) == kept
    del out


def test_recomputation_saves_no_hidden_activation():
    mlp = build(Mlp)
    seen = []
    mlp.fc1.register_forward_hook(lambda module, inputs, out: seen.append(weakref.ref(out)))
    out = recomputed(mlp, tokens().requires_grad_())
    assert [hidden() for hidden in seen] == [None]
    del out
