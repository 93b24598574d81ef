"""Attention within windows, with contextual relative position, by our own kernel for CUDA, bf16 and fp16.

Torch's fused attention takes the relative position as a bias of all logits, which goes through memory six times a step.
Here each token carries its place in the window instead: the P prefix tokens (the class token and registers) come first,
a patch has place P + K*row + column, and padding has 63.
The tokens may be all those of a window, or some of them, which differ between windows (PR-MIM, late mask tokens).

Shapes: G windows of K x K patches, L tokens of a window (including prefix tokens), H heads, C channels of a head.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.relative_position import AXIS_BUCKETS, CLASS_BUCKET, NUM_BUCKETS, axis_buckets, grid_buckets

PLACES = 64  # also the padded number of buckets
MAX_WINDOW_SIZE = 7  # with a larger one, a bucket has more than 3 x 3 keys, and there are more than 64 places
MAX_HEAD_DIM = 128
MAX_PREFIX_TOKENS = 9  # they share one bucket, whose gradient is a sum of 3 x 3 keys like that of the others


class WindowTokens(NamedTuple):
    """The tokens of windows, as the kernels read them; N is L rounded up to a power of two that leaves padding."""

    buckets: Tensor  # (64, 64) int8: the bucket of each pair of places
    keys: Tensor  # (2, 3, 64, 64) int8, from `_keys_of_buckets`
    place: Tensor  # (G or 1, N) int8: the place of each token, 63 for padding
    token: Tensor  # (G or 1, 64) int8: the token at each place, or a padding token
    in_order: bool  # whether each token's place is its index


def window_tokens(size: int, patches: Tensor | None, device: torch.device, num_prefix_tokens: int = 1) -> WindowTokens:
    """The prefix tokens and some patches of windows of `size` x `size` patches.

    Args:
        size: K, at most `MAX_WINDOW_SIZE`.
        patches: (G, T) int64 positions within the windows, in any order; None for all of them in raster order.
        num_prefix_tokens: P, from 1 to `MAX_PREFIX_TOKENS`.
    """
    all_patches = patches is None
    if patches is None:
        patches = torch.arange(size * size, device=device)[None]
    rows, T = patches.shape
    L = num_prefix_tokens + T
    padded = padded_tokens(L)
    order = torch.arange(L, device=device).expand(rows, -1)
    place = torch.cat([order[:, :num_prefix_tokens], num_prefix_tokens + patches], dim=1)
    token = patches.new_full((rows, PLACES), padded - 1).scatter(1, place, order)
    place = F.pad(place, (0, padded - L), value=PLACES - 1)
    in_order = all_patches and padded == PLACES
    return WindowTokens(*_tables(size, device, num_prefix_tokens), place.to(torch.int8), token.to(torch.int8), in_order)


def padded_tokens(tokens: int) -> int:
    """N, for L tokens of a window: a power of two that leaves padding, at least 16."""
    return max(16, 1 << tokens.bit_length())


@lru_cache
def _tables(size: int, device: torch.device, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    outside = PLACES - num_prefix_tokens - size * size
    buckets = F.pad(grid_buckets(size, size, num_prefix_tokens), (0, outside, 0, outside), value=CLASS_BUCKET)
    return buckets.to(device, torch.int8), _keys_of_buckets(size, num_prefix_tokens).to(device)


def _keys_of_buckets(size: int, num_prefix_tokens: int) -> Tensor:
    """The keys that each bucket's gradient sums, for each query's place, in two stages of three summands.

    Stage 1 adds the keys of one row that share a column's bucket c, into place 7*row + c; the prefix tokens' keys go to
    49, 50 and 51. Stage 2 adds those that share a row's bucket r, into bucket 7*r + c. A missing summand is 63, an
    empty place. A prefix token's query has no summands: its bias is equal for all keys, which softmax ignores.

    Returns:
        (2, 3, 64, 64) int8.
    """
    keys = torch.full((2, 3, PLACES, PLACES), PLACES - 1, dtype=torch.int8)
    axis = axis_buckets(size)  # axis[i][j]: 0..6
    for row in range(size):
        for col in range(size):
            query = num_prefix_tokens + row * size + col
            for bucket in range(AXIS_BUCKETS):
                same_col = [j for j in range(size) if axis[col][j] == bucket]
                same_row = [j for j in range(size) if axis[row][j] == bucket]
                for m, key_col in enumerate(same_col):
                    for key_row in range(size):
                        key = num_prefix_tokens + key_row * size + key_col
                        keys[0, m, query, key_row * AXIS_BUCKETS + bucket] = key
                for m, key_row in enumerate(same_row):
                    for other in range(AXIS_BUCKETS):
                        keys[1, m, query, bucket * AXIS_BUCKETS + other] = key_row * AXIS_BUCKETS + other
            for prefix in range(num_prefix_tokens):
                keys[0, prefix % 3, query, CLASS_BUCKET + prefix // 3] = prefix
                keys[1, prefix // 3, query, CLASS_BUCKET] = CLASS_BUCKET + prefix // 3
    return keys


class Launch(NamedTuple):
    """How a kernel is started: heads of one program, warps, stages of its pipeline."""

    heads: int
    warps: int
    stages: int


def choose_launch(backward: bool, padded: int, heads: int, head_dim: int, hopper: bool) -> Launch:
    """Chosen by the compiler's reports, not by timing: on sm_90 none of these spills registers into memory.

    Several heads per program mean fewer partial sums of the table's gradient; before sm_90 there are too few registers.

    Args:
        backward: which of the two kernels.
        padded: N.
        heads, head_dim: H and C.
        hopper: whether the GPU has compute capability 9.x: an H100 or H200.
    """
    warps = 8 if padded == PLACES and (backward or not hopper) else 4
    if not hopper or head_dim > 64:
        return Launch(1, 8 if head_dim > 64 else warps, 1)
    return Launch(next(n for n in (4, 3, 2, 1) if heads % n == 0), warps, 2)


def _launch(qkv: Tensor, place: Tensor, backward: bool) -> Launch:
    hopper = not qkv.is_cuda or torch.cuda.get_device_capability(qkv.device)[0] == 9
    return choose_launch(backward, place.shape[1], qkv.shape[3], qkv.shape[4], hopper)


@torch.library.custom_op("lomar::window_attention", mutates_args=())
def _forward(
    qkv: Tensor,
    table: Tensor,
    buckets: Tensor,
    keys: Tensor,
    place: Tensor,
    token: Tensor,
    in_order: bool,
) -> Tensor:
    from pretrain.models.window_kernels import forward_kernel  # Triton is not installed on every machine

    G, L, _, H, C = qkv.shape
    N = place.shape[1]
    out = qkv.new_empty(G, L, H, C)
    heads, warps, stages = _launch(qkv, place, backward=False)
    forward_kernel[(G, H // heads)](
        qkv, table.to(qkv.dtype), buckets, place, out, C**-0.5, H, _row_stride(place),
        L=L, N=N, C=C, CP=_padded_channels(C), NB=PLACES, HEADS=heads, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


@torch.library.custom_op("lomar::window_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    qkv: Tensor,
    table: Tensor,
    buckets: Tensor,
    keys: Tensor,
    place: Tensor,
    token: Tensor,
    in_order: bool,
) -> tuple[Tensor, Tensor]:
    from pretrain.models.window_kernels import backward_kernel

    G, L, _, H, C = qkv.shape
    N = place.shape[1]
    dqkv = torch.empty_like(qkv)
    heads, warps, stages = _launch(qkv, place, backward=True)
    dtable = qkv.new_empty(G * (H // heads), C, PLACES, dtype=torch.float32)
    backward_kernel[(G, H // heads)](
        qkv, table.to(qkv.dtype), buckets, keys, place, token, dout.contiguous(), dqkv, dtable, C**-0.5, H,
        _row_stride(place), _row_stride(token),
        L=L, N=N, C=C, CP=_padded_channels(C), NB=PLACES, HEADS=heads, SUBSET=not in_order,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dqkv, dtable.sum(0)


@_forward.register_fake
def _(
    qkv: Tensor,
    table: Tensor,
    buckets: Tensor,
    keys: Tensor,
    place: Tensor,
    token: Tensor,
    in_order: bool,
) -> Tensor:
    G, L, _, H, C = qkv.shape
    return qkv.new_empty(G, L, H, C)


@_backward.register_fake
def _(
    dout: Tensor,
    qkv: Tensor,
    table: Tensor,
    buckets: Tensor,
    keys: Tensor,
    place: Tensor,
    token: Tensor,
    in_order: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv), torch.empty_like(table)


def _save_inputs(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.in_order = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    dqkv, dtable = _backward(dout, *ctx.saved_tensors, ctx.in_order)
    return dqkv, dtable, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save_inputs)


def _row_stride(rows: Tensor) -> int:
    return rows.shape[1] if len(rows) > 1 else 0


def _padded_channels(channels: int) -> int:
    return max(16, 1 << (channels - 1).bit_length())


def window_attention(qkv: Tensor, table: Tensor, tokens: WindowTokens) -> Tensor:
    """softmax(q k^T / sqrt(C) + q . table[bucket]) v within each window.

    Args:
        qkv: (G, L, 3, H, C) contiguous bf16 or fp16, the linear layer's output.
        table: (C, 50) of any dtype: `RelativeKey`'s vectors, shared by the heads.
        tokens: from `window_tokens`.

    Returns:
        (G, L, H, C), in `qkv`'s dtype.
    """
    return _forward(qkv, F.pad(table.float(), (0, PLACES - NUM_BUCKETS)), *tokens)


@torch.no_grad()
def worst_error(
    size: int,
    count: int,
    heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    num_prefix_tokens: int = 1,
) -> float:
    """Compares the kernels with the formula in float64: the largest relative error; NaN if a result is not finite.

    On random windows of `size` x `size` patches, `count` of which are tokens. Also compiles the kernels for these.
    """
    generator = torch.Generator().manual_seed(0)
    P = num_prefix_tokens
    L = P + count
    some = torch.rand(2, size * size, generator=generator).argsort(1)[:, :count]
    patches = None if count == size * size else some
    index = torch.arange(L).expand(2, -1) if patches is None else F.pad(P + patches, (P, 0))
    buckets = grid_buckets(size, size, P)[index[:, :, None], index[:, None, :]]
    shapes = ((2, L, 3, heads, head_dim), (head_dim, NUM_BUCKETS), (2, L, heads, head_dim))
    qkv, table, dout = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    results = []
    for there, precision in ((device, dtype), (torch.device("cpu"), torch.float64)):
        qkv, table = (tensor.detach().to(there, precision).requires_grad_() for tensor in (qkv, table))
        with torch.enable_grad():
            if precision == dtype:
                tokens = window_tokens(size, patches if patches is None else patches.to(there), there, P)
                out = window_attention(qkv, table, tokens)
            else:
                out = _formula(qkv, table, buckets)
        gradients = torch.autograd.grad(out, (qkv, table), dout.to(there, precision))
        results.append([tensor.cpu().double() for tensor in (out, *gradients)])
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True))


def _formula(qkv: Tensor, table: Tensor, buckets: Tensor) -> Tensor:
    q, k, v = qkv.unbind(2)
    bias = torch.einsum("gihc,gijc->ghij", q, table.T[buckets])
    logits = torch.einsum("gihc,gjhc->ghij", q, k) * q.shape[-1] ** -0.5 + bias
    return torch.einsum("ghij,gjhc->gihc", logits.softmax(-1), v)
