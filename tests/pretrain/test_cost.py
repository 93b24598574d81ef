"""What a step costs, counted and never timed: multiply-adds, what is kept for the backward pass, compiled graphs.

On tiny encoders, against formulas written by hand, and against what was recorded: whoever makes a step cheaper lowers
the record.

Shapes: W windows of 7x7 patches, V of them visible, M masked, K kept by PR-MIM; D width, H heads, P values of a patch.
"""

import functools
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks import fake_gpu
from benchmarks.fake_gpu import Count, count
from benchmarks.graphs import count_graphs
from pretrain.config import PretrainConfig, load
from pretrain.models.vit import ARCHS, Arch, Block
from pretrain.plan.block_cost import AttentionKind, Numerics, attention_flops, kept_bytes, matrix_flops
from pretrain.plan.trace import trace_method

DEPTH, LATE = 6, 4
D, H = 32, 2
W, V, M, K = 4, 10, 39, 15
P = 16 * 16 * 3
BUCKETS = 50
METHODS = {
    "lomar": ("lomar_vitb16_224_400e", ()),
    "late": ("lomar_vitb16_224_400e", (f"method.mask_token_block={LATE}",)),
    "pr": ("lomar_vitb16_224_400e", ("pr_mim.throw_ratio=0.5",)),
    "fast": ("lomar_vitb16_224_400e", (f"method.mask_token_block={LATE}", "pr_mim.throw_ratio=0.5")),
    "mae": (
        "mae_vitb16_224_1600e",
        ("method.decoder_embed_dim=64", "method.decoder_depth=2", "method.decoder_num_heads=4"),
    ),
    "crossmae": (
        "crossmae_vitb16_224_800e",
        (
            "method.predict_ratio=0.25",
            "method.decoder_embed_dim=64",
            "method.decoder_depth=2",
            "method.decoder_num_heads=4",
        ),
    ),
}
RECORDED = {
    "lomar": 2006624,
    "late": 1278112,
    "pr": 1355108,
    "fast": 1075108,
    "mae": 1881992,
    "crossmae": 915992,
}  # bytes an image


@pytest.fixture(autouse=True)
def tiny() -> Iterator[None]:
    with mock.patch.dict(ARCHS, vit_tiny=Arch(D, DEPTH, H)):
        yield


def configuration(name: str) -> PretrainConfig:
    recipe, overrides = METHODS[name]
    return load(recipe, ["data.shards=none", "model.arch=vit_tiny", *overrides])


@functools.cache
def counted(name: str, window_kernel: bool = False) -> Count:
    return count(configuration(name), window_kernel)


def aligned(tokens: int, to: int) -> int:
    return -(-tokens // to) * to


def blocks(number: int, L: int, bias: int = 0, width: int = D) -> int:
    """Multiply-adds of transformer blocks on L tokens: four matrices, logits and sums, and the bias of the logits."""
    return number * (12 * L * width**2 + 2 * L**2 * width + bias)


def all_tokens(number: int) -> int:
    """On all of a window: a vector for each pair, its keys padded to a multiple of 8."""
    L = 1 + V + M
    return blocks(number, L, L * aligned(L, 8) * D)


def some_tokens(number: int, L: int) -> int:
    """On some of a window: a product with each bucket's vector, from which a one-hot selects each pair's."""
    return blocks(number, L, BUCKETS * L * D + BUCKETS * H * L * aligned(L, 8))


ENDS = V * P * D + M * D * P  # patch embedding and head
AGGREGATION = 49 * 49 * D  # a depth-wise 7x7 convolution
MACS = {
    "lomar": W * (ENDS + all_tokens(DEPTH)),
    "late": W * (ENDS + some_tokens(LATE, 1 + V) + all_tokens(DEPTH - LATE)),
    "pr": W * (ENDS + some_tokens(DEPTH, 1 + V + K) + AGGREGATION),
    "fast": W * (ENDS + some_tokens(LATE, 1 + V) + some_tokens(DEPTH - LATE, 1 + V + K) + AGGREGATION),
    "mae": 49 * P * D + blocks(DEPTH, 50) + 50 * D * 64 + blocks(2, 197, width=64) + 147 * 64 * P,
    # Sums over the streams; then queries, outputs and MLPs of 49 patches, keys and values of 50 tokens, logits.
    "crossmae": 49 * P * D
    + blocks(DEPTH, 50)
    + 2 * (1 + DEPTH) * 50 * D
    + 2 * (10 * 49 * 64**2 + 2 * 50 * D * 64 + 2 * 49 * 50 * 64)
    + 49 * 64 * P,
}


@pytest.mark.parametrize("name", METHODS)
def test_multiply_adds_are_those_of_the_formula(name: str):
    assert counted(name).flops == 2 * MACS[name]


def test_extrapolated_blocks_cost_what_all_of_them_do():
    config = configuration("fast")
    method, ema = fake_gpu.build(config)
    assert len(method.encoder.blocks) == DEPTH
    one, two = (fake_gpu._count_batch(config, method, ema, batch) for batch in (1, 2))
    assert counted("fast") == (two.flops - one.flops, two.kept - one.kept)


def kept_for_a_bias(L: int) -> int:
    """Bytes, of one block and window: the bias, the queries again, and the sums of the softmax."""
    return 2 * H * L * aligned(L, 8) + 2 * L * D + 4 * H * aligned(L, 32)


def kept_once(L: int) -> int:
    """Bytes, of a window with some of its tokens: which, one-hot for each pair; for the kernel int8 places instead."""
    padded = max(16, 1 << L.bit_length())
    return 2 * BUCKETS * L * aligned(L, 8) - (padded + 64)


ALL, SOME, VISIBLE = 1 + V + M, 1 + V + K, 1 + V
SAVED_BY_KERNEL = {
    "lomar": W * DEPTH * kept_for_a_bias(ALL),
    "late": W * (LATE * kept_for_a_bias(VISIBLE) + kept_once(VISIBLE) + (DEPTH - LATE) * kept_for_a_bias(ALL)),
    "pr": W * (DEPTH * kept_for_a_bias(SOME) + kept_once(SOME)),
    "fast": W
    * (LATE * kept_for_a_bias(VISIBLE) + kept_once(VISIBLE) + (DEPTH - LATE) * kept_for_a_bias(SOME) + kept_once(SOME)),
}


@pytest.mark.parametrize("name", SAVED_BY_KERNEL)
def test_the_window_kernel_keeps_neither_bias_nor_queries_nor_sums(name: str):
    assert counted(name).kept - counted(name, window_kernel=True).kept == SAVED_BY_KERNEL[name]


@pytest.mark.parametrize("name", METHODS)
def test_no_more_is_kept_for_the_backward_pass_than_was_recorded(name: str):
    assert counted(name, window_kernel="mae" not in name).kept <= RECORDED[name]


@pytest.mark.parametrize("attention", ["sdpa", "triton"])
@pytest.mark.parametrize("name", METHODS)
def test_the_planner_says_the_same(name: str, attention: AttentionKind):
    """Its formulas know shapes only; small differences are what a whole step keeps once."""
    recipe, overrides = METHODS[name]
    config = load(recipe, ["data.shards=none", *overrides])
    trace, numerics = trace_method(config), Numerics(attention=attention)
    flops, kept = trace.ends.forward_flops, trace.ends.kept
    for call in trace.calls:
        tokens = call.sequences * call.tokens * call.blocks
        flops += tokens * (matrix_flops(call) + attention_flops(call))
        kept += tokens * kept_bytes(call, numerics)
    counted_here = count(config, window_kernel=attention == "triton" and "mae" not in name)
    assert kept == pytest.approx(counted_here.kept, rel=0.02)
    assert flops == pytest.approx(counted_here.flops, rel=0.02)


@pytest.mark.parametrize(
    ("name", "graphs"), [("lomar", 1), ("late", 2), ("pr", 1), ("fast", 2), ("mae", 2), ("crossmae", 2)]
)
def test_compiled_blocks_are_one_unbroken_graph_for_each_length(name: str, graphs: int):
    """Encoder and decoder, or before and after mask tokens enter; however many blocks there are."""
    assert count_graphs(configuration(name)) == graphs


def test_a_broken_graph_is_noticed(monkeypatch: pytest.MonkeyPatch):
    def forward(self: Block, x: Tensor, position: Tensor | None) -> Tensor:
        torch._dynamo.graph_break()
        return x + self.attn(self.norm1(x), position)

    monkeypatch.setattr(Block, "forward", forward)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        count_graphs(configuration("lomar"))
