"""Attention by torch's fused CUDA kernels, with a bitwise reproducible backward pass.

Torch picks its fastest kernel. On an H100 that is cuDNN's, whose backward pass is not deterministic; flash attention's
is not either for more than two blocks of keys. The memory-efficient kernel's is, as long as it does not split the keys
among programs that add to one sum. Only the operators below `scaled_dot_product_attention` let us request that.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_ALIGNMENT = 8  # of a head's channels, and of the keys of a bias' row in memory
_deterministic = False


def set_deterministic(deterministic: bool) -> None:
    """Chooses this process' CUDA kernels: those of `fused_attention` and, as far as possible, of other callers."""
    global _deterministic
    _deterministic = deterministic
    torch.backends.cuda.enable_cudnn_sdp(not deterministic)
    torch.backends.cudnn.deterministic = deterministic  # convolutions: PR-MIM's, among others


def fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(C) + bias) v for (B, H, L, C) CUDA tensors and an optional (B or 1, H, L, L) bias."""
    if not _deterministic:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    if q.shape[-1] % _ALIGNMENT or q.dtype == torch.float64:  # not supported by the fused kernels
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if bias is not None:
        bias = aligned(bias.to(q.dtype)).expand(len(q), -1, -1, -1)
    return _MemoryEfficient.apply(q, k, v, bias).transpose(1, 2)


def aligned(bias: Tensor) -> Tensor:
    """The same (..., L, L) bias, copied if its memory layout does not suit the operator, which does not check it.

    Keys are contiguous, and every row begins at a multiple of 8 elements.
    """
    L = bias.shape[-1]
    if bias.stride(-1) == 1 and all(stride % _ALIGNMENT == 0 for stride in bias.stride()[:-1]):
        return bias
    return F.pad(bias.contiguous(), (0, -L % _ALIGNMENT))[..., :L]


class _MemoryEfficient(torch.autograd.Function):
    """(B, L, H, C) each, the last dimension contiguous; the bias' rows aligned."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        out, logsumexp, seed, offset, _, _ = torch.ops.aten._efficient_attention_forward(
            q, k, v, bias, None, None, None, None, dropout_p=0.0, custom_mask_type=0, compute_log_sumexp=True
        )
        ctx.save_for_backward(q, k, v, bias, out, logsumexp, seed, offset)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        q, k, v, bias, out, logsumexp, seed, offset = ctx.saved_tensors
        dq, dk, dv, dbias = torch.ops.aten._efficient_attention_backward(
            grad.contiguous(), q, k, v, bias, out, None, None, q.shape[1], k.shape[1], logsumexp, 0.0, seed, offset,
            custom_mask_type=0, bias_requires_grad=ctx.needs_input_grad[3], num_splits_key=1,
        )  # fmt: skip
        return dq, dk, dv, dbias if ctx.needs_input_grad[3] else None
