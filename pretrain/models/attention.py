"""Self-attention, with relative position or without.

Shapes: B sequences, H heads, L tokens, C channels of a head.
"""

from torch import Tensor, nn

from pretrain.models.relative_position import RelativeBias, RelativeKey
from pretrain.models.sdpa import fused_attention
from pretrain.models.window_attention import WindowTokens, window_attention

Position = Tensor | WindowTokens  # of all pairs of tokens: buckets, or what the window kernel reads instead


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(C) + bias) v for (B, H, L, C) tensors and an optional (B or 1, H, L, L) bias."""
    if q.is_cuda:
        return fused_attention(q, k, v, bias)
    # torch's fused CPU kernel has no backward for a bias and is slower in bf16 at the lengths of windows.
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (logits if bias is None else logits + bias).softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    """Multi-head self-attention with timm's parameter names, plus `rpe_k` or `rpe_bias` where position is relative.

    Args:
        dim, heads: width and number of heads.
        relative: whether position is contextual and relative.
        bias_grid: the grid of a learned relative bias, used instead.
    """

    def __init__(self, dim: int, heads: int, relative: bool, bias_grid: tuple[int, int] | None = None):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rpe_k = RelativeKey(dim // heads) if relative else None
        self.rpe_bias = RelativeBias(heads, bias_grid) if bias_grid else None

    def forward(self, x: Tensor, position: Position | None) -> Tensor:
        """(B, L, D) -> (B, L, D); `position` of the encoder's kind, None if position is absolute."""
        B, L, D = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.heads, D // self.heads)
        if isinstance(position, WindowTokens):
            assert self.rpe_k is not None
            return self.proj(window_attention(qkv, self.rpe_k.lookup_table_weight[0], position).flatten(2))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = None
        for relative in (self.rpe_k, self.rpe_bias):
            if relative is not None:
                assert position is not None, "relative attention needs the buckets of its tokens"
                bias = relative(q, position)
        return self.proj(attend(q, k, v, bias).transpose(1, 2).reshape(B, L, D))
