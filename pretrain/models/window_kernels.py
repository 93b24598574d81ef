"""The kernels of `window_attention.py`, in Triton: one program for each window and group of heads.

    o_i = softmax_j(scale q_i . k_j + (q_i . table)[bucket(i, j)]) v_j

A row of logits lies in one program, so there is no log-sum-exp to keep, no split of the keys, and no atomic addition:
the same bits every time. The backward pass recomputes everything from q, k and v.

Shapes: G windows, H heads, L tokens padded to N, C channels of a head padded to CP, NB places of a window, which is
also the padded number of buckets.
"""

import triton
import triton.language as tl


@triton.jit
def _load(base, offs_l, offs_c, stride_l, L: tl.constexpr, C: tl.constexpr):
    mask = (offs_l < L)[:, None] & (offs_c < C)[None, :]
    return tl.load(base + offs_l[:, None] * stride_l + offs_c[None, :], mask=mask, other=0.0)


@triton.jit
def _probabilities(q, k, table, ids, offs, scale, L: tl.constexpr):
    terms = tl.dot(q, table)  # (N, NB) fp32: the query's product with every bucket
    logits = tl.dot(q, tl.trans(k)) * scale + tl.gather(terms, ids, 1)
    logits = tl.where((offs < L)[None, :], logits, float("-inf"))
    p = tl.exp(logits - tl.max(logits, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def forward_kernel(
    qkv,  # (G, L, 3, H, C)
    table,  # (C, NB)
    ids_ptr,  # (NB, NB) int8: the bucket of each pair of places
    place_ptr,  # (G or 1, N) int8
    out,  # (G, L, H, C)
    scale,
    H,
    stride_place,  # 0 if all windows have the same tokens
    L: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    NB: tl.constexpr,
    HEADS: tl.constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * HEADS
    offs, offs_c, offs_b = tl.arange(0, N), tl.arange(0, CP), tl.arange(0, NB)
    D = H * C
    place = tl.load(place_ptr + g * stride_place + offs).to(tl.int32)
    ids = tl.load(ids_ptr + place[:, None] * NB + place[None, :]).to(tl.int32)
    tab = tl.load(table + offs_c[:, None] * NB + offs_b[None, :], mask=(offs_c < C)[:, None], other=0.0)
    for n in range(HEADS):
        channel = (first + n) * C
        base = qkv + g * (L * 3) * D + channel
        q = _load(base, offs, offs_c, 3 * D, L, C)
        k = _load(base + D, offs, offs_c, 3 * D, L, C)
        v = _load(base + 2 * D, offs, offs_c, 3 * D, L, C)
        p = _probabilities(q, k, tab, ids, offs, scale, L)
        o = tl.dot(p.to(v.dtype), v)
        target = out + g * L * D + channel + offs[:, None] * D + offs_c[None, :]
        tl.store(target, o.to(out.dtype.element_ty), mask=(offs < L)[:, None] & (offs_c < C)[None, :])


@triton.jit
def _sum_by_bucket(ds, keys_ptr, place, inverse, offs_b, N: tl.constexpr, NB: tl.constexpr, SUBSET: tl.constexpr):
    """The gradient of the bias' gather, (N, NB): each bucket's sum of `ds` over its keys.

    A scatter would need atomics. But the keys of a bucket are a rectangle of at most 3 x 3 places: gather and add along
    columns, then along rows.
    """
    part = ds
    if SUBSET:  # tokens -> places; places without a token read a padding token, whose gradient is 0
        part = tl.gather(ds, tl.broadcast_to(inverse[None, :], (N, NB)), 1)
    for stage in tl.static_range(2):
        total = tl.zeros((N, NB), dtype=tl.float32)
        for m in tl.static_range(3):
            keys = tl.load(keys_ptr + ((stage * 3 + m) * NB + place[:, None]) * NB + offs_b[None, :]).to(tl.int32)
            total += tl.gather(part, keys, 1)
        part = total
    return part


@triton.jit
def backward_kernel(
    qkv,
    table,
    ids_ptr,
    keys_ptr,  # (2, 3, NB, NB) int8: what `_sum_by_bucket` adds up, for each query's place
    place_ptr,
    inverse_ptr,  # (G or 1, NB) int8: the token at each place
    dout,  # (G, L, H, C)
    dqkv,
    dtable,  # (programs, C, NB) fp32: each program's part
    scale,
    H,
    stride_place,
    stride_inverse,
    L: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    NB: tl.constexpr,
    HEADS: tl.constexpr,
    SUBSET: tl.constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * HEADS
    offs, offs_c, offs_b = tl.arange(0, N), tl.arange(0, CP), tl.arange(0, NB)
    D = H * C
    place = tl.load(place_ptr + g * stride_place + offs).to(tl.int32)
    inverse = tl.load(inverse_ptr + g * stride_inverse + offs_b).to(tl.int32)
    ids = tl.load(ids_ptr + place[:, None] * NB + place[None, :]).to(tl.int32)
    tab = tl.load(table + offs_c[:, None] * NB + offs_b[None, :], mask=(offs_c < C)[:, None], other=0.0)
    acc = tl.zeros((CP, NB), dtype=tl.float32)
    mask = (offs < L)[:, None] & (offs_c < C)[None, :]
    for n in range(HEADS):
        channel = (first + n) * C
        base = qkv + g * (L * 3) * D + channel
        q = _load(base, offs, offs_c, 3 * D, L, C)
        k = _load(base + D, offs, offs_c, 3 * D, L, C)
        v = _load(base + 2 * D, offs, offs_c, 3 * D, L, C)
        do = _load(dout + g * L * D + channel, offs, offs_c, D, L, C)
        p = _probabilities(q, k, tab, ids, offs, scale, L)
        dp = tl.dot(do, tl.trans(v))
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        dv = tl.dot(tl.trans(p.to(do.dtype)), do)
        low = ds.to(q.dtype)
        dk = tl.dot(tl.trans(low), q) * scale
        dterms = _sum_by_bucket(ds, keys_ptr, place, inverse, offs_b, N, NB, SUBSET).to(q.dtype)
        dq = tl.dot(low, k) * scale + tl.dot(dterms, tl.trans(tab))
        acc += tl.dot(tl.trans(q), dterms)
        target = dqkv + g * (L * 3) * D + channel + offs[:, None] * (3 * D) + offs_c[None, :]
        tl.store(target, dq.to(q.dtype), mask=mask)
        tl.store(target + D, dk.to(q.dtype), mask=mask)
        tl.store(target + 2 * D, dv.to(q.dtype), mask=mask)
    program = g * tl.num_programs(1) + tl.program_id(1)
    tl.store(dtable + program * C * NB + offs_c[:, None] * NB + offs_b[None, :], acc, mask=(offs_c < C)[:, None])
