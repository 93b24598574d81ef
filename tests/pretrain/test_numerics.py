"""Tests of numerics: settings chosen per device, rejected settings, and their effect on modules."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import loss_and_gradients, random_images, random_mask_indices, randomize, tiny_lomar

from pretrain import numerics
from pretrain.config import load
from pretrain.models import sdpa
from pretrain.models.attention import RelativeKey
from pretrain.models.relative_position import grid_buckets, pair_buckets
from pretrain.models.vit import Block
from pretrain.models.window_attention import window_attention, window_tokens
from pretrain.numerics import Numerics, apply_numerics, choose_numerics
from pretrain.trainer.checkpoint_layout import TrainState
from pretrain.trainer.config import CheckpointConfig
from pretrain.trainer.launch import World

LOMAR = "lomar_vitb16_224_400e"
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Makes torch report an H100 with Triton and a compiler."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(numerics, "_compiler_obstacle", lambda: "")
    return monkeypatch


def chosen(*overrides: str, recipe: str = LOMAR, device: torch.device = GPU, stage: int = 1) -> Numerics:
    return choose_numerics(load(recipe, ["data.shards=none", *overrides]), device, stage)


@pytest.mark.usefixtures("gpu")
def test_gpu_defaults_to_all_fast_and_deterministic_settings():
    for recipe in (LOMAR, "lomar_vith14_224_1600e", "lomar_pr_vitb16_224_400e"):
        assert chosen(recipe=recipe) == Numerics(True, "triton", "fp32", "efficient", cuda_graphs=True)
    assert not chosen("model.cuda_graphs=off").cuda_graphs
    assert not chosen("model.grad_checkpointing=true").cuda_graphs


def test_cpu_does_not_compile_or_use_the_window_kernel():
    found = chosen(device=CPU)
    assert (found.compile, found.attention, found.sdpa) == (False, "sdpa", "cpu")
    assert "GPU" in found.why_sdpa


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("overrides", "recipe", "why"),
    [
        (["method.window_size=8"], LOMAR, "8x8"),
        (["train.precision=fp32"], LOMAR, "bf16"),
        (["model.position=sincos"], LOMAR, "sincos"),
        (["model.attention=sdpa"], LOMAR, "model.attention=sdpa"),
        ([], "mae_vitb16_224_1600e", "sincos"),
        (["model.position=relative"], "simmim_vitb16_224_800e", "14x14"),
    ],
)
def test_unsupported_kernel_cases_fall_back_to_sdpa_with_a_reason(overrides: list[str], recipe: str, why: str):
    found = chosen(*overrides, recipe=recipe)
    assert found.attention == "sdpa"
    assert why in found.why_sdpa


@pytest.mark.usefixtures("gpu")
def test_zero_stage_3_is_not_compiled():
    assert not chosen(stage=3).compile
    with pytest.raises(ValueError, match=r"model\.compile=on silently loses gradients in ZeRO stage 3"):
        chosen("model.compile=on", stage=3)


@pytest.mark.usefixtures("gpu")
def test_explicit_settings_that_cannot_be_met_are_rejected():
    with pytest.raises(ValueError, match=r"model\.attention=triton cannot be used: .*8x8"):
        chosen("model.attention=triton", "method.window_size=8")
    with pytest.raises(ValueError, match=r"model\.residual=bf16 needs train\.precision=bf16"):
        chosen("model.residual=bf16", "train.precision=fp32")


def test_without_a_compiler_nothing_is_compiled(gpu: pytest.MonkeyPatch):
    gpu.setattr(numerics, "_compiler_obstacle", lambda: "there is no C compiler (gcc)")
    found = chosen()
    assert (found.compile, found.attention, found.why_sdpa) == (False, "sdpa", "there is no C compiler (gcc)")
    for setting in ("model.compile=on", "model.attention=triton"):
        with pytest.raises(ValueError, match=rf"{setting} cannot be used: there is no C compiler"):
            chosen(setting)


def test_gpu_without_bf16_is_rejected(gpu: pytest.MonkeyPatch):
    gpu.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    gpu.setattr(torch.cuda, "get_device_name", lambda device: "V100")
    with pytest.raises(ValueError, match=r"V100 does not support bf16: set train\.precision=fp32"):
        chosen()
    assert chosen("train.precision=fp32").attention == "sdpa"


@pytest.mark.parametrize(
    ("error", "problem"),
    [(0.5, r"its relative error is 5\.0e-01"), (float("nan"), "its relative error is nan"), (None, "no ptxas")],
)
def test_window_kernel_that_fails_its_check_is_rejected(
    error: float | None, problem: str, monkeypatch: pytest.MonkeyPatch
):
    def worst_error(*_: Any) -> float:
        if error is None:
            raise RuntimeError("no ptxas\nat line 3")
        return error

    monkeypatch.setattr(numerics, "worst_error", worst_error)
    with pytest.raises(ValueError, match=rf"does not work here \(.*{problem}\): set model\.attention=sdpa"):
        numerics.check_window_kernel(load(LOMAR, ["data.shards=none"]), GPU)
    monkeypatch.setattr(numerics, "worst_error", lambda *_: 0.004)
    numerics.check_window_kernel(load(LOMAR, ["data.shards=none"]), GPU)


def test_bf16_residual_stream_is_close_to_fp32():
    losses: dict[str, Any] = {}
    for residual in ("fp32", "bf16"):
        method = tiny_lomar()
        seen: list[torch.dtype] = []
        method.encoder.blocks[1].register_forward_pre_hook(
            lambda module, inputs, seen=seen: seen.append(inputs[0].dtype)
        )
        apply_numerics(method, Numerics(False, "sdpa", residual, "cpu"))
        with torch.autocast("cpu", torch.bfloat16):
            losses[residual], gradients = loss_and_gradients(method, random_images(method), random_mask_indices(method))
        assert seen == [torch.bfloat16 if residual == "bf16" else torch.float32]
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    assert losses["fp32"] != losses["bf16"]
    torch.testing.assert_close(losses["bf16"], losses["fp32"], rtol=0.01, atol=0)


def test_copies_of_compiled_modules_are_not_compiled():
    """The teacher and the probe copy the encoder and must compute with their own weights."""
    method = tiny_lomar()
    apply_numerics(method, Numerics(True, "sdpa", "fp32", "cpu"))
    blocks = [module for module in method.modules() if isinstance(module, Block)]
    assert all(block._compiled_call_impl is not None for block in blocks)
    copied = copy.deepcopy(method.encoder)
    assert all(block._compiled_call_impl is None for block in copied.blocks)


def test_compiled_blocks_with_activation_checkpointing_keep_gradients():
    results = []
    for compiled in (False, True):
        method = tiny_lomar(grad_checkpointing=True)
        randomize(method)
        for block in method.encoder.blocks:
            if compiled:
                block.compile(backend="aot_eager", dynamic=False, fullgraph=True)
        results.append(loss_and_gradients(method, random_images(method), random_mask_indices(method)))
    (loss, gradients), (compiled_loss, compiled_gradients) = results
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(compiled_gradients, gradients)


@pytest.mark.parametrize("compiled", [False, True])
def test_deterministic_attention_calls_operators_that_exist(compiled: bool, monkeypatch: pytest.MonkeyPatch):
    """Checks shapes and names on the meta device, since the kernels need a GPU. Compiled, it must be one graph."""
    monkeypatch.setattr(sdpa, "_deterministic", True)
    attention: Any = sdpa.fused_attention
    if compiled:
        attention = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=False)
    q, k, v = (torch.empty(2, 3, 50, 16, device="meta", requires_grad=True) for _ in range(3))
    learned = torch.empty(2, 3, 50, 50, device="meta", requires_grad=True)
    for bias in (None, learned, torch.empty(3, 50, 50, device="meta")):
        out = attention(q, k, v, bias)
        assert out.shape == q.shape
        out.sum().backward()
        assert q.grad is not None
        assert q.grad.shape == q.shape
        if bias is not None and bias.requires_grad:
            assert bias.grad is not None
            assert bias.grad.shape == bias.shape


@pytest.mark.parametrize("kind", ["heads last in memory", "odd rows", "as it should be"])
def test_aligned_copies_a_bias_only_if_its_layout_does_not_fit(kind: str):
    bias = torch.randn(1, 16, 50, 50)
    if kind == "heads last in memory":
        bias = bias.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    if kind == "as it should be":
        bias = torch.nn.functional.pad(bias, (0, 6))[..., :50]
    laid_out = sdpa.aligned(bias)
    assert torch.equal(laid_out, bias)
    assert laid_out.stride(-1) == 1
    assert all(stride % 8 == 0 for stride in laid_out.stride()[:-1])
    assert (laid_out is bias) == (kind == "as it should be")


def test_compiled_relative_position_uses_no_embedding():
    """Inductor sums an embedding's gradient with atomic additions, even on a CPU, which is not deterministic."""
    operators: set[str] = set()

    def collect(graph: torch.fx.GraphModule, _: Any) -> Any:
        operators.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    key, q = RelativeKey(8), torch.randn(2, 2, 10, 8)
    randomize(key)
    buckets = grid_buckets(3, 3)
    compiled = torch.compile(key, backend=collect, fullgraph=True)(q, buckets)
    assert not any("embedding" in name for name in operators), operators
    torch.testing.assert_close(compiled, key(q, buckets))


def test_window_kernel_is_a_single_operator_in_the_graph():
    """torch.compile sees its shapes and gradients, not its implementation."""
    tokens = window_tokens(7, None, torch.device("meta"))
    qkv = torch.empty(4, 50, 3, 2, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    table = torch.empty(64, 50, device="meta", requires_grad=True)
    compiled = torch.compile(window_attention, backend="aot_eager", fullgraph=True, dynamic=False)
    out = compiled(qkv, table, tokens)
    assert (out.shape, out.dtype) == ((4, 50, 2, 64), torch.bfloat16)
    out.sum().backward()
    assert qkv.grad is not None
    assert table.grad is not None
    assert (qkv.grad.shape, qkv.grad.dtype) == (qkv.shape, torch.bfloat16)
    assert (table.grad.shape, table.grad.dtype) == (table.shape, torch.float32)


def test_pair_buckets_of_token_subsets_are_one_hot():
    buckets = torch.randint(0, 50, (10, 10))
    one_hot = pair_buckets(buckets, torch.tensor([[0, 4], [8, 2]]))
    assert one_hot.shape == (2, 3, 3, 50), "padded keys are for GPUs only"
    assert (one_hot.argmax(-1)[0] == buckets[[0, 1, 5]][:, [0, 1, 5]]).all()


@pytest.mark.parametrize(("key", "now"), [("masks", "drawn from .*"), ("decoder", "torchvision's.*")])
def test_resume_with_other_masks_or_decoder_needs_exact_resume_false(key: str, now: str, tmp_path: Path):
    """An older run drew masks with NumPy's distributions, or decoded and resized images with Pillow."""
    from pretrain.trainer.checkpoint import Checkpoints  # imports DeepSpeed

    present = Numerics(True, "triton", "fp32", "efficient").signature()
    before = {name: value for name, value in present.items() if name != key}
    states = [TrainState(numerics=numerics) for numerics in (before, present)]
    with pytest.raises(ValueError, match=rf"same bits: {key} was 'unset' and is [\"']{now}exact_resume=false"):
        Checkpoints(tmp_path, World(0, 1, 0), CheckpointConfig())._check_numerics(*states)
    Checkpoints(tmp_path, World(0, 1, 0), CheckpointConfig(exact_resume=False))._check_numerics(*states)
