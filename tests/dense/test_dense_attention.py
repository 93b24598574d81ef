"""Tests that grid attention matches masked pairwise attention in any chunk size and never stores all logits."""

import pytest
import torch
from helpers.naive_attention import naive_attention, randomized
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from downstream.dense.backbone import attention as module
from downstream.dense.backbone.attention import DecomposedAttention, GridAttention, RelativeAttention, attend_fused
from downstream.dense.backbone.relative_position import decomposed_terms

KINDS = ("relative", "decomposed")


def build(kind: str, grid: tuple[int, int], dim: int = 12, heads: int = 2) -> GridAttention:
    torch.manual_seed(0)
    plain = RelativeAttention(dim, heads) if kind == "relative" else DecomposedAttention(dim, heads, grid)
    return randomized(plain)


def tokens(count: int, dim: int = 12, seed: int = 5) -> Tensor:
    return torch.randn(2, count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_gradients(function, x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = function(x)
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(8))
    gradients = torch.autograd.grad((out * weights).sum(), [x, *parameters])
    return [out.detach(), *gradients]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("grid", "window", "class_token", "table"),
    [
        ((4, 6), 2, False, None),
        ((5, 7), 3, False, None),  # windows are cut off at both edges
        ((3, 8), 3, False, None),  # at one edge
        ((7, 3), 3, False, None),
        ((3, 2), 5, False, None),  # smaller than a window
        ((9, 11), 9, False, None),  # reaches the buckets of far positions
        ((5, 6), 0, False, None),
        ((5, 6), 0, True, None),
        ((6, 9), 0, False, (4, 5)),  # tables of another size
        ((3, 4), 0, True, (4, 5)),
    ],
)
def test_matches_pairwise_attention(kind, grid, window, class_token, table, monkeypatch):
    """Outputs and all gradients match, computed at once and in chunks of one and two rows."""
    attention = build(kind, table or ((window, window) if window else grid)).double()
    x = tokens(grid[0] * grid[1] + class_token)
    parameters = list(attention.parameters())
    expected = with_gradients(lambda x: naive_attention(attention, x, grid, window), x, parameters)
    row_logits = 2 * 2 * grid[1] * x.shape[1]
    for limit in (2**22, 1, 2 * row_logits):
        monkeypatch.setitem(module._MAX_LOGITS, "cpu", limit)
        found = with_gradients(lambda x: attention(x, grid, window), x, parameters)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        with torch.no_grad():
            torch.testing.assert_close(attention(x, grid, window), expected[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("grid", [(4, 5), (7, 3)])
def test_fused_attention_matches_and_has_a_flash_kernel(grid, class_token):
    shape = (3, 2, 2, grid[0] * grid[1] + class_token, 8)
    q, k, v = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    attention = build("decomposed", grid, dim=16).double()
    patches = q[:, :, int(class_token) :]
    terms = decomposed_terms(patches, attention.rel_pos_h, attention.rel_pos_w, grid).detach()

    def gradients(function) -> tuple[Tensor, ...]:
        inputs = [t.clone().requires_grad_() for t in (q, k, v, terms)]
        padded = nn.functional.pad(inputs[3], (0, 0, int(class_token), 0))
        out = function(*inputs[:3], padded)
        return out.detach(), *torch.autograd.grad(out.square().sum(), inputs)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        fused = gradients(lambda *t: attend_fused(*t, grid))
    by_rows = gradients(lambda *t: module.attend_by_rows(*t, module.decomposed_bias, grid))
    for a, b in zip(fused, by_rows, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_a_full_image_are_never_stored(kind, monkeypatch):
    side, heads = 32, 2
    monkeypatch.setitem(module._MAX_LOGITS, "cpu", 2 * heads * side**3)
    attention = build(kind, (side, side))
    x = tokens(side**2).float()[:1].requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = attention(x, (side, side))
        out.sum().backward()
    all_logits = heads * side**4
    assert largest.size == 2 * heads * side**3, "two rows of queries"
    assert sum(kept.values()) < all_logits / 3
    assert largest.size < all_logits / 15


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [0, 3])
def test_bf16_is_close_and_deterministic(kind, window):
    attention = build(kind, (3, 3) if window else (7, 8), dim=32)
    x = torch.randn(2, 56, 32, generator=torch.Generator().manual_seed(5))
    results = []
    for enabled in (False, True, True):
        attention.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = attention(x, (7, 8), window)
        out.float().square().mean().backward()
        results.append([out.detach(), *(p.grad.clone() for p in attention.parameters())])
    full, half, again = results
    assert half[0].dtype == torch.bfloat16
    for exact, rounded, repeated in zip(full, half, again, strict=True):
        assert torch.equal(rounded, repeated)
        assert (exact - rounded.float()).norm() < 0.05 * exact.norm() + 1e-6


def test_windows_reject_a_class_token():
    with pytest.raises(AssertionError, match="class token"):
        build("relative", (3, 3))(tokens(10).float(), (3, 3), 2)
