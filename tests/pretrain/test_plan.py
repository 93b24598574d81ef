"""The planner: counts compared with the real methods, its formulas, and rejected input."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.shard_tools import write_tar
from helpers.tiny import random_images, random_mask_indices
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plan_steps import planned_steps
from benchmarks.saved import saved_storages
from data.order import PART
from data.transforms import Augmentation
from pretrain.build import build_ema, build_method, untrained_teacher
from pretrain.config import PretrainConfig, load
from pretrain.plan import __main__ as command
from pretrain.plan.advice import advise
from pretrain.plan.block_cost import Numerics, attention_bytes, attention_flops, matrix_flops, table_gradient_bytes
from pretrain.plan.communication import step_communication
from pretrain.plan.estimate import Plan, choose_numerics, make_plan
from pretrain.plan.hardware import GPUS, Cluster, build_cluster
from pretrain.plan.loader_cost import SMALLER, Photographs, core_seconds, index_bytes
from pretrain.plan.memory import (
    GIB,
    Zero,
    activation_bytes,
    engine_buffers,
    largest_micro_batch,
    state_memory,
    step_memory,
    workspace_bytes,
)
from pretrain.plan.step_time import BETWEEN_STEPS, DEPTHWISE_SHARE, HOST_WINDOWS, MEASURED, step_time
from pretrain.plan.trace import trace_method

LOMAR, MAE, SIMMIM, LUT = (
    "lomar_vitb16_224_400e",
    "mae_vitb16_224_1600e",
    "simmim_vitb16_224_800e",
    "lut_vitb16_224_1600e",
)
LATE, PR = "method.mask_token_block=8", "pr_mim.throw_ratio=0.5"
SMALL = ("data.image_size=128", "train.global_batch_size=8")
TWO_WINDOWS = ("method.num_windows=2", *SMALL)
CASES = [
    (LOMAR, *TWO_WINDOWS),
    (LOMAR, LATE, *TWO_WINDOWS),
    (LOMAR, PR, *TWO_WINDOWS),
    (LOMAR, LATE, PR, *TWO_WINDOWS),
    (LOMAR, "method.architecture=asymmetric", *TWO_WINDOWS),
    (MAE, *SMALL),
    (MAE, PR, *SMALL),
    (SIMMIM, *SMALL),
    (LUT, *SMALL),
    ("lc_mae_vitb16_224_100e", *SMALL),
    ("local_mim_pr_vitb16_224_100e", *SMALL),
    ("mff_vitb16_224_800e", *SMALL),
    ("crossmae_vitb16_224_800e", "method.predict_ratio=0.25", "method.decoder_depth=3", *SMALL),
    ("lomar_cross_vitb16_224_400e", "method.decoder_depth=2", *TWO_WINDOWS),
    ("tec_vitb16_224_300e", *SMALL),
    ("mae_ema_vitb16_224_75e", "method.num_masks=2", *SMALL),
]
EAGER, FASTEST = Numerics(), Numerics(compile=True, residual="bf16", attention="triton")
ON_CPU = Numerics(attention="unfused")


def configure(recipe: str, *overrides: str) -> PretrainConfig:
    return load(recipe, ["data.shards=none", *overrides])


def plan_on(gpus: int, recipe: str, *overrides: str, numerics: Numerics | None = None, gpu: str = "h100") -> Plan:
    config, cluster = configure(recipe, *overrides), build_cluster(gpu, gpus)
    numerics = numerics or choose_numerics(config, cluster)
    return make_plan(config, cluster, 1_281_167, numerics, trace_method(config))


def run_method(config: PretrainConfig, copies: int = 1) -> tuple[float, float]:
    """Forward flops and bytes kept for the backward pass under autocast, for `copies` batches of two images."""
    method = build_method(config, untrained_teacher(config))
    ema = build_ema(config, method, torch.device("cpu"))
    images = random_images(method).repeat(copies, 1, 1, 1)
    if config.lut:
        images = images.unsqueeze(1).expand(-1, 2, -1, -1, -1).contiguous()
    mask_indices = {
        name: array.repeat(copies, *[1] * (array.ndim - 1)) for name, array in random_mask_indices(method).items()
    }
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        inputs = ema.model_inputs(images)
        with saved_storages(method) as saved:
            loss = method(images, mask_indices, **inputs)["loss"]
    kept = sum(saved.values())
    del loss
    return counter.get_total_flops(), kept


@pytest.mark.parametrize("case", CASES, ids=lambda case: "+".join(case).replace(".", "_"))
def test_flops_and_kept_bytes_match_the_real_method(case: tuple[str, ...]):
    config = configure(*case, "model.arch=vit_small")
    trace = trace_method(config)
    (flops, kept), (_, kept_of_twice) = run_method(config), run_method(config, copies=2)
    planned = trace.ends.forward_flops + sum(
        call.blocks * call.sequences * call.tokens * (matrix_flops(call) + attention_flops(call))
        for call in trace.calls
    )
    # Where windows keep different tokens, one-hot buckets add one percent on a CPU with an encoder this small.
    assert planned == pytest.approx(flops / 2, rel=0.015)
    assert activation_bytes(trace, ON_CPU, checkpointing=False) == pytest.approx((kept_of_twice - kept) / 2, rel=0.05)


def test_traces_vit_huge():
    trace = trace_method(configure("lomar_vith14_224_1600e"))
    assert trace.parameters == pytest.approx(631e6, rel=1e-3)
    (call,) = trace.calls
    assert (call.sequences, call.tokens, call.dim, call.blocks) == (4, 50, 1280, 32)


def test_lut_teacher_encodes_whole_views_without_backward():
    trace = trace_method(configure(LUT))
    teacher = next(call for call in trace.calls if not call.backward)
    assert (teacher.sequences, teacher.tokens, teacher.blocks) == (2, 197, 12)
    assert trace.averaged > 85e6
    assert step_memory(trace, EAGER, Zero(1), 8, images=8).teacher == 4 * trace.averaged


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        (Zero(0), (400, 400, 800)),
        (Zero(1), (400, 400, 300)),  # a quarter of the moments and fp32 weights
        (Zero(2), (400, 100, 300)),
        (Zero(3), (100, 100, 300)),
        (Zero(2, offload_optimizer=True), (400, 0, 0)),
        (Zero(3, offload_optimizer=True, offload_parameters=True), (0, 0, 0)),
    ],
)
def test_state_memory_by_zero_stage(zero: Zero, expected: tuple[float, ...]):
    assert state_memory(100_000_000, zero, gpus=4) == tuple(size * 1e6 for size in expected)


def test_engine_buffers_by_zero_stage():
    size, bucket = 100_000_000, 25_000_000
    assert engine_buffers(size, Zero(0), 4) == (0, 400e6)
    assert engine_buffers(size, Zero(1, bucket), 4) == (100e6, 100e6)
    assert engine_buffers(size, Zero(2, bucket, overlap=True), 4) == (200e6, 100e6)
    gathered = 400e6 + 200e6 / 4
    assert engine_buffers(size, Zero(3, bucket), 4) == (100e6 + gathered, 200e6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", range(4))
def test_largest_micro_batch_fits_but_one_more_image_does_not(stage: int, checkpointing: bool):
    trace, zero = trace_method(configure(LOMAR)), Zero(stage)
    largest = largest_micro_batch(trace, EAGER, zero, 8, 79 * GIB, checkpointing)

    def total(images: int) -> float:
        return step_memory(trace, EAGER, zero, 8, images, checkpointing).total

    assert total(largest) <= 79 * GIB < total(largest + 1)
    assert largest_micro_batch(trace, EAGER, zero, 8, GIB, checkpointing) == 0


def test_activation_checkpointing_trades_time_for_memory():
    plain, checkpointed = (
        plan_on(8, LOMAR, f"model.grad_checkpointing={value}", numerics=EAGER) for value in ("false", "true")
    )
    assert checkpointed.memory.activations < plain.memory.activations / 4
    assert 1.2 < checkpointed.step.total / plain.step.total < 1.4


@pytest.mark.parametrize("recipe", [MAE, LUT])
def test_activation_checkpointing_recomputes_only_the_encoder(recipe: str):
    full = configure(recipe, "model.grad_checkpointing=true")
    small = trace_method(configure(recipe, "method.decoder_depth=1"))
    small = replace(small, calls=tuple(call for call in small.calls if call.backward))
    cluster = build_cluster("h100", 8)
    steps = [step_time(full, cluster, EAGER, Zero(1), trace, 64)[0] for trace in (trace_method(full), small)]
    assert steps[0].recomputed == pytest.approx(steps[1].recomputed)
    encoder = next(call for call in small.calls if call.encoder)
    tokens = full.train.gradient_accumulation_steps * 64 * encoder.blocks * encoder.sequences * encoder.tokens
    products = tokens * matrix_flops(encoder) / (989e12 * 0.803 * 0.8)
    assert products < steps[0].recomputed < 3 * products


def test_run_that_does_not_fit_gets_advice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    assert run_command(monkeypatch, "lomar_vith14_224_1600e", "--gpus", "8", "--gpu", "l4") == 0
    assert "does not fit: set " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "hopper", "share"),  # relative to the other bytes of the window kernel's backward pass
    [
        (LOMAR, True, 0.18),
        ("lomar_vitl16_224_1600e", True, 0.18),
        ("lomar_vith14_224_1600e", True, 0.73),
        (LOMAR, False, 0.73),
    ],
)
def test_partial_table_gradients_add_to_the_moved_bytes(recipe: str, hopper: bool, share: float):
    (call,) = trace_method(configure(recipe)).calls
    moved = attention_bytes(call, replace(FASTEST, hopper=hopper)).backward
    assert moved / (14 * call.dim) - 1 == pytest.approx(share, abs=0.005)
    assert attention_bytes(call, EAGER) == attention_bytes(call, replace(EAGER, hopper=not EAGER.hopper))


def test_partial_table_gradients_need_memory_if_larger_than_mlp_gradients():
    """GPUs before Hopper have one for each head of each window, here of 11 tokens."""
    trace = trace_method(configure(LOMAR, LATE))
    visible = next(call for call in trace.calls if call.tokens < 50)
    alone = replace(trace, calls=(visible,))
    parts = 4 * 12 * 64 * 64 * 4  # windows, heads, channels, buckets
    assert table_gradient_bytes(visible, replace(FASTEST, hopper=False)) * 4 * visible.tokens == parts
    tokens = 4 * visible.tokens * visible.dim
    assert workspace_bytes(alone, replace(FASTEST, hopper=False)) == 12 * tokens + parts
    assert workspace_bytes(alone, FASTEST) == 24 * tokens
    assert plan_on(8, LOMAR, gpu="a100", numerics=FASTEST).numerics.hopper is False


# ------------------------------------------------------------------------------------------------ time


@pytest.mark.parametrize(
    ("recipe", "images", "numerics", "milliseconds"),
    [
        (LOMAR, 256, EAGER, 96.7),
        (LOMAR, 256, Numerics(compile=True), 84.5),
        (LOMAR, 256, Numerics(compile=True, attention="triton"), 72.7),
        (LOMAR, 256, FASTEST, 66.8),
        ("lomar_vitl16_224_1600e", 256, FASTEST, 206.6),
        ("lomar_vith14_224_1600e", 128, FASTEST, 208.1),
    ],
)
def test_step_times_equal_hand_calculations(recipe: str, images: int, numerics: Numerics, milliseconds: float):
    """The formulas of docs/planning.md, calculated by hand for one H100, without the empirical factor `MEASURED`."""
    batch = (f"train.global_batch_size={images}", "train.gradient_accumulation_steps=1", "data.num_workers=99")
    plan = plan_on(1, recipe, *batch, numerics=numerics)
    around = plan.step.optimizer + plan.step.host
    assert plan.step.host == BETWEEN_STEPS[False]
    counted = (plan.step.total - around) / MEASURED + around
    assert counted * 1e3 == pytest.approx(milliseconds, rel=0.04)
    assert plan.step.data == 0


def test_depthwise_convolution_does_not_use_tensor_cores():
    """PR-MIM's 7x7 kernel on 4 windows of 7x7 patches: 98 flops per value in each of 3 passes, 5 maps in bf16."""
    trace = trace_method(configure(LOMAR, PR))
    values = 4 * 49 * 768
    assert trace.ends.depthwise.flops == 98 * values
    assert trace.ends.depthwise.bytes == pytest.approx(5 * 2 * values, rel=0.01)
    without = trace_method(configure(LOMAR))
    assert trace.ends.forward_flops - without.ends.forward_flops == 98 * values
    assert trace.ends.backward_flops - without.ends.backward_flops == 2 * 98 * values
    batch = ("train.global_batch_size=256", "train.gradient_accumulation_steps=1")
    seconds = 256 * 3 * 98 * values / (67e12 * DEPTHWISE_SHARE) * MEASURED
    assert plan_on(1, LOMAR, PR, *batch).step.convolution == pytest.approx(seconds)
    assert plan_on(1, LOMAR, *batch).step.convolution == 0


def test_planned_step_times_are_close_to_measured_ones():
    """Measured on an H200 in plain PyTorch."""
    for name, measured, planned in planned_steps("h200"):
        assert planned == pytest.approx(measured, rel=0.11), name


def test_cuda_graphs_remove_host_time_but_need_gradient_memory():
    small = ("train.global_batch_size=32", "train.gradient_accumulation_steps=1", "data.num_workers=99")
    plain = plan_on(1, LOMAR, *small, numerics=FASTEST)
    graphs = plan_on(1, LOMAR, *small, numerics=replace(FASTEST, cuda_graphs=True))
    assert graphs.step.host == BETWEEN_STEPS[False]
    assert plain.step.total == pytest.approx(12 * HOST_WINDOWS + plain.step.optimizer + BETWEEN_STEPS[False])
    more = graphs.stages[0].memory.total - plain.stages[0].memory.total
    assert more == 4 * plain.trace.parameters, "the gradients that the graph writes"


def test_gradient_reduction_time_follows_from_its_bytes():
    """ViT-B's 345 MB take about 1.7 ms on NVLink and 60 ms on a 100 Gb/s network, not overlapped."""
    parameters, h100 = 86_300_000, GPUS["h100"]
    node = step_communication(parameters, Zero(0), Cluster(h100, 8, 8, 400), 2, 0.03, 0.06)
    assert node.exposed == pytest.approx(1.7e-3, rel=0.1)
    many = step_communication(parameters, Zero(0), Cluster(h100, 256, 8, 100), 2, 0.03, 0.06)
    assert many.network_bytes == pytest.approx(2 * 4 * parameters * 31 / 32)
    assert many.exposed == pytest.approx(60e-3, rel=0.05)


def test_only_overlap_with_several_buckets_hides_communication():
    cluster, passes = Cluster(GPUS["h100"], 64, 8, 200), (2, 0.03, 0.06)
    bare, one_bucket, buckets = (
        step_communication(86_300_000, zero, cluster, *passes)
        for zero in (Zero(1), Zero(1, overlap=True), Zero(1, 25_000_000, overlap=True))
    )
    assert bare.exposed == one_bucket.exposed  # a single bucket is full only when the backward pass ends
    assert buckets.exposed < 0.7 * bare.exposed
    assert buckets.node_bytes == bare.node_bytes
    assert step_communication(86_300_000, Zero(1), Cluster(GPUS["h100"], 1, 1, 200), *passes).seconds == 0


def test_bytes_sent_by_zero_stage_with_gradient_accumulation():
    cluster, size = Cluster(GPUS["a100"], 8, 8, 200), 4 * 86_300_000 * 7 / 8
    sent = [step_communication(86_300_000, Zero(stage), cluster, 4, 0.03, 0.06).node_bytes / size for stage in range(4)]
    assert sent == pytest.approx([2, 2 + 1, 4 * 2 + 1, 4 * 3])


def test_too_few_workers_limit_the_run_and_advice_raises_them():
    plan = plan_on(8, LOMAR, "data.num_workers=2")
    assert plan.limit == "data"
    best = advise(plan)[0]
    assert best.change == f"data.num_workers={-(-plan.loader_cores // 8):.0f}"
    enough = plan_on(8, LOMAR, best.change)
    assert enough.limit != "data"
    assert plan.hours / enough.hours == pytest.approx(best.gain, rel=0.02)


def test_size_schedule_sums_hours_and_takes_the_largest_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    shared = ("data.num_workers=99", "train.epochs=100", "model.cuda_graphs=off")
    alone = {
        size: plan_on(8, LOMAR, f"data.image_size={size}", f"method.num_windows={windows}", *shared)
        for size, windows in ((128, 1), (256, 5), (224, 4))
    }
    schedule = "data.size_schedule=0:128,50:256,70:224"
    assert run_command(monkeypatch, LOMAR, *shared, schedule, "--gpus", "8", "--gpu", "h100", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert [(part["size"], part["epochs"]) for part in planned["sizes"]] == [
        ([128, 128], 50),
        ([256, 256], 20),
        ([224, 224], 30),
    ]
    hours = [alone[size].hours * epochs / 100 for size, epochs in ((128, 50), (256, 20), (224, 30))]
    assert [part["hours"] for part in planned["sizes"]] == pytest.approx(hours)
    assert planned["hours"] == pytest.approx(sum(hours))
    assert planned["steps"] == alone[224].steps
    assert planned["step_seconds"] == alone[224].step.total
    assert planned["memory"][0]["plain"]["total"] == alone[256].memory.total > alone[224].memory.total
    cores = [alone[size].loader_cores for size in alone]
    assert planned["node"]["loader_cores"] == pytest.approx(max(cores))


def test_advice_is_a_command_line_override():
    plan = plan_on(8, LOMAR, "model.grad_checkpointing=true", "data.num_workers=99")
    assert "model.grad_checkpointing=false" in [item.change for item in advise(plan)]


def test_memory_peak_in_the_optimizer_step_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    small = ("model.arch=vit_huge", "model.patch_size=14", "train.global_batch_size=16", "train.ds_config=zero0")
    assert run_command(monkeypatch, LOMAR, *small, "--gpus", "8", "--gpu", "h100") == 0
    out = capsys.readouterr().out
    assert "     0.00     0.00" in next(line for line in out.splitlines() if line.startswith("* 0"))
    assert "casts and kept 0.00: the peak is in the optimizer's step" in out


def test_advice_on_cheaper_methods_reports_their_gain():
    plan = plan_on(8, LOMAR, "data.num_workers=99")
    gains = {item.change: item.gain for item in advise(plan)}
    late = plan_on(8, LOMAR, LATE, "data.num_workers=99")
    assert gains[LATE] == pytest.approx(plan.hours / late.hours)
    assert gains[f"{LATE} {PR}"] > gains[LATE] > 1.8


def test_index_memory_is_shared_and_order_memory_is_per_rank():
    assert index_bytes(1_000_000, ranks=1) == 1_000_000 * (48 + 24)
    assert index_bytes(1_000_000, ranks=8) == 1_000_000 * (48 + 8 * 24)
    assert index_bytes(10**9, ranks=8) == 10**9 * 48 + 8 * PART * 24


def test_repeats_save_decoding():
    enough = "data.num_workers=99"  # otherwise waiting for data would count
    once, twice = plan_on(8, LOMAR, enough), plan_on(8, LOMAR, enough, "data.repeats=2")
    assert once.core_seconds - twice.core_seconds == pytest.approx(once.photographs.decode / 2)
    assert twice.steps == once.steps
    assert twice.node_needs.read_rate / twice.images_per_second == pytest.approx(
        once.node_needs.read_rate / once.images_per_second / 2
    )


def test_plans_1024_gpus_and_ten_billion_images(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    arguments = [
        "train.epochs=1",
        "optim.warmup_epochs=0",
        "train.gradient_accumulation_steps=1",
        "--gpus",
        "1024",
        "--gpu",
        "h100",
    ]
    assert run_command(monkeypatch, LOMAR, *arguments, "--images", "10000000000", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 10_000_000_000 // 4096
    assert found["micro_batch"] == 4
    assert found["hours"] > 1
    assert 440 < found["node"]["index_memory"] < 460  # GiB: the first limit that a larger run reaches
    assert sum(found["step_parts"].values()) == pytest.approx(found["step_seconds"])
    assert [stage["stage"] for stage in found["memory"]] == [0, 1, 2, 3]
    assert run_command(monkeypatch, LOMAR, *arguments, "--images", "30000000000") == 0
    assert "MORE THAN NODES USUALLY HAVE" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ command and advice


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr("sys.argv", ["plan", *arguments])
    return command.main()


def test_printed_table_has_all_parts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    assert run_command(monkeypatch, "--gpus", "16", LOMAR, "--gpu", "H100", "train.epochs=100", "--link", "200") == 0
    out = capsys.readouterr().out
    assert "casts and kept 0.00" not in out
    for part in ("GPU-hours", "largest", "matrix products", "NVLink", "network, 200 Gb/s", "cores", "limited by"):
        assert part in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "8", "--gpu", "h1000"), "did you mean h100?"),
        (("--gpus", "0", "--gpu", "h100"), "--gpus 0 must be at least 1"),
        (("--gpus", "12", "--gpu", "h100"), "set --gpus to 8 or 16"),
        (("--gpus", "24", "--gpu", "h100"), "set train.global_batch_size to 4080 or 4128, or start 16 ranks"),
        (("--gpus", "8", "--gpu", "v100"), "set train.precision=fp32"),
        (("--gpus", "8", "--gpu", "h100", "--link", "0"), "--link 0"),
        (("--gpus", "8", "--gpu", "h100", "--images", "100"), "100 samples are fewer"),
        (("--gpus", "8", "--gpu", "h100", "--images", "-5"), "--images -5 must be at least 1"),
        (
            ("--gpus", "1024", "--gpu", "h100", "train.gradient_accumulation_steps=8"),
            "or start 512 ranks",
        ),
        (
            ("--gpus", "8", "--gpu", "h100", "model.attention=triton", "method.window_size=8"),
            "up to 7x7 patches, not 8x8",
        ),
        (("--gpus", "8", "--gpu", "h100", "train.ds_config=zero3", "model.compile=on"), "set model.compile=off, or"),
        (("--gpus", "8", "--gpu", "h100", "model.attention=triton", "method.window_size=9"), "model.attention=auto"),
        (("--gpus", "8", "--gpu", "h100", "train.epoch=3"), "unknown key train.epoch"),
    ],
)
def test_invalid_input_prints_a_one_line_error(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    assert run_command(monkeypatch, LOMAR, *arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_planner_chooses_numerics_for_an_h100():
    def chosen(*overrides: str) -> Numerics:
        return choose_numerics(configure(LOMAR, *overrides), build_cluster("h100", 8))

    fast: Any = {
        "compile": True,
        "residual": "fp32",
        "attention": "triton",
        "precision": "bf16",
        "cuda_graphs": True,
    }
    assert chosen() == Numerics(**fast)
    assert chosen("train.ds_config=zero3") == replace(Numerics(**fast), compile=False, cuda_graphs=False)
    assert chosen("method.window_size=9") == replace(Numerics(**fast), attention="sdpa")
    assert chosen("model.cuda_graphs=off") == replace(Numerics(**fast), cuda_graphs=False)
    assert chosen("model.residual=bf16") == replace(Numerics(**fast), residual="bf16")
    assert chosen("train.precision=fp32") == replace(Numerics(**fast), attention="sdpa", precision="fp32")


def test_advice_reduces_decoding_if_gpus_wait_for_large_images():
    few = "data.num_workers=4"
    plan, twice = plan_on(8, LOMAR, few), plan_on(8, LOMAR, few, "data.repeats=2")
    smaller = make_plan(plan.config, plan.cluster, plan.images, plan.numerics, plan.trace, photographs=SMALLER)
    gains = {item.change: item.gain for item in advise(plan)}
    assert gains["data.repeats=2"] == pytest.approx(plan.hours / twice.hours)
    assert gains["python -m data.pack --short-side 288 --quality 90"] == pytest.approx(plan.hours / smaller.hours)
    assert gains["data.repeats=2"] > 1.3
    for other in (smaller, plan_on(8, LOMAR, few, "data.image_size=448"), plan_on(8, LOMAR, "data.num_workers=99")):
        assert not any("data.pack" in item.change for item in advise(other)), (
            "they are small, or too small, or no limit"
        )


@pytest.mark.parametrize(
    ("side", "photographs", "repeats", "measured"),
    [
        *((224, Photographs(), 1, 395), (448, Photographs(), 1, 256), (224, SMALLER, 1, 713), (448, SMALLER, 1, 361)),
        *((224, Photographs(), 2, 650), (448, Photographs(), 2, 346)),
    ],
)
def test_loading_time_is_close_to_measurements(side: int, photographs: Photographs, repeats: int, measured: int):
    """Views per second and core, measured by benchmarks/loader.py."""
    seconds = core_seconds((side, side), [Augmentation()], repeats, photographs)
    assert seconds == pytest.approx(1 / measured, rel=0.03)


def test_number_and_size_of_images_are_read_from_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    write_tar(tmp_path / "a.tar", [(f"{number}.jpg", bytes(37_000)) for number in range(20)])
    (tmp_path / "pack.json").write_text('{"short_side": 288, "quality": 90}')
    keys = (f"data.shards={tmp_path}", "train.global_batch_size=8", "train.gradient_accumulation_steps=1")
    assert run_command(monkeypatch, LOMAR, *keys, "--gpus", "1", "--gpu", "h100") == 0
    out = capsys.readouterr().out
    assert "20 images, 400 epochs: 800 steps" in out
    assert "at 37 KB each (photographs whose short side was over 288 pixels were shrunk to it, JPEG 90)" in out
