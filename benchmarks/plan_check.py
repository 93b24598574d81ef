"""Measures the errors of `python -m pretrain.plan`, against counts on a CPU, published times and an H200's steps.

    python benchmarks/plan_check.py [--quick]

1. flops of a forward pass, counted by torch in the real method;
2. bytes per image kept for the backward pass under bf16 autocast: of the real method on the CPU, against the formula
   for a CPU's attention, which writes its logits to memory; and on a fake GPU (`fake_gpu.py`), with SDPA and with the
   window kernel;
3. memory of 1, 2 and 4 real DeepSpeed processes in every ZeRO stage: after a step, and at its peak;
4. hours and rates reported in papers, planned as closely as possible to the authors' setup: eager, fp32 residual,
   attention through memory. docs/planning.md explains the errors;
5. steps that were measured on an H200.

`--quick` uses a smaller encoder on the CPU, and at most 2 processes. It takes minutes on two cores. The last line is
one JSON object.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks import fake_gpu
from benchmarks.allocated import draw_batch, measure_step
from benchmarks.cost import LOMAR, MAE, SIMMIM
from benchmarks.plan_steps import planned_steps
from benchmarks.saved import saved_storages
from pretrain.build import build_ema, build_method
from pretrain.config import PretrainConfig, load
from pretrain.models.relative_position import grid_buckets
from pretrain.models.vit import Arch, Block
from pretrain.plan.block_cost import Numerics, attention_flops, kept_bytes, matrix_flops
from pretrain.plan.estimate import Plan, make_plan, own_zero
from pretrain.plan.hardware import GPU, GPUS, Cluster
from pretrain.plan.memory import CONTEXT, FRAGMENTATION, activation_bytes, state_memory, step_memory
from pretrain.plan.trace import BlockCall, Trace, trace_method

ON_CPU = Numerics(compile=False, residual="fp32", attention="unfused")
IMAGENET = 1_281_167

COUNTED = {
    "LoMaR": (LOMAR,),
    "LoMaR, late": (LOMAR, "method.mask_token_block=8"),
    "LoMaR + PR 50 %": (LOMAR, "pr_mim.throw_ratio=0.5"),
    "LoMaR, late + PR 50 %": (LOMAR, "method.mask_token_block=8", "pr_mim.throw_ratio=0.5"),
    "LoMaR, asymmetric": (LOMAR, "method.architecture=asymmetric"),
    "LoMaR + LUT": ("lut_lomar_vitb16_224_400e",),
    "MAE": (MAE,),
    "MAE + PR 50 %": (MAE, "pr_mim.throw_ratio=0.5"),
    "MAE + LUT": ("lut_vitb16_224_1600e",),
    "SimMIM": (SIMMIM,),
    "SimMIM + PR 30 %": (SIMMIM, "pr_mim.throw_ratio=0.3"),
    "LC-MAE": ("lc_mae_vitb16_224_100e",),
}


@dataclass(frozen=True)
class Row:
    """One comparison."""

    check: str
    name: str
    unit: str
    truth: float
    planned: float

    @property
    def error(self) -> float:
        return self.planned / self.truth - 1

    def __str__(self) -> str:
        return f"{self.name:40}{self.truth:12,.2f}{self.planned:12,.2f} {self.unit:10}{self.error:+8.1%}"


def forward_flops(trace: Trace) -> float:
    blocks = sum(
        call.blocks * call.sequences * call.tokens * (matrix_flops(call) + attention_flops(call))
        for call in trace.calls
    )
    return trace.ends.forward_flops + blocks


def count_flops(config: PretrainConfig) -> float:
    """FLOPs of one image's forward pass, including a teacher's."""
    method = build_method(config)
    ema = build_ema(config, method, torch.device("cpu"))
    images, mask_indices = draw_batch(method, config, 2)
    with FlopCounterMode(display=False) as counter:
        method(images, mask_indices, **ema.model_inputs(images))
    return counter.get_total_flops() / len(images)


def count_kept(config: PretrainConfig) -> float:
    """Bytes kept for one more image."""
    method = build_method(config)
    ema = build_ema(config, method, torch.device("cpu"))
    kept = []
    for size in (2, 3):
        images, mask_indices = draw_batch(method, config, size)
        inputs = ema.model_inputs(images)
        with torch.autocast("cpu", torch.bfloat16), saved_storages(method) as saved:
            loss = method(images, mask_indices, **inputs)["loss"]
        kept.append(sum(saved.values()))
        del loss
    return kept[1] - kept[0]


def check_counts(quick: bool) -> list[Row]:
    rows = []
    for name, (recipe, *overrides) in tqdm(COUNTED.items(), desc="flops and kept bytes"):
        for device, arch in (("CPU", "vit_tiny" if quick else "vit_small"), ("GPU", "vit_base")):
            config = load(recipe, ["data.shards=none", f"model.arch={arch}", *overrides])
            trace = trace_method(config)
            if device == "CPU":
                kept = {"unfused": count_kept(config)}
                rows.append(Row("flops", name, "GFLOP", count_flops(config) / 1e9, forward_flops(trace) / 1e9))
            else:
                kept = {"sdpa": fake_gpu.count(config).kept}
                if config.model.position == "relative":
                    kept["triton"] = fake_gpu.count(config, window_kernel=True).kept
            for kind, truth in kept.items():
                planned = activation_bytes(trace, Numerics(attention=kind), checkpointing=False)
                rows.append(Row(f"kept, {device}", f"{name}, {kind}", "MiB", truth / 2**20, planned / 2**20))
    return rows


def check_compiled() -> list[Row]:
    """Compares what a block compiled by the CPU's Inductor keeps with the formula for compiled blocks."""
    arch, tokens, sequences = Arch(192, 1, 3), 50, (8, 16)
    block, buckets = Block(arch, relative=True), grid_buckets(7, 7)
    forward = torch.compile(block.forward, dynamic=False)
    kept = []
    for count in sequences:
        x = torch.randn(count, tokens, arch.dim, requires_grad=True)
        for _ in range(2):  # the first compiles
            with torch.autocast("cpu", torch.bfloat16), saved_storages(block) as saved:
                forward(x, buckets)
        kept.append(sum(saved.values()))
    truth = (kept[1] - kept[0]) / (sequences[1] - sequences[0]) / tokens
    call = BlockCall(1, tokens, arch.dim, arch.heads, 1, relative=True, encoder=True, backward=True)
    planned = kept_bytes(call, replace(ON_CPU, compile=True))
    return [Row("compiled", "a compiled block, 192 wide, a token", "bytes", truth, planned)]


def check_memory(quick: bool) -> list[Row]:
    """Uses one image per rank, to measure weights, gradients, optimizer and DeepSpeed instead of activations."""
    rows = []
    cases = [(stage, ranks) for ranks in ((1, 2) if quick else (1, 2, 4)) for stage in range(4)]
    for stage, ranks in tqdm(cases, desc="ZeRO"):
        config = load(
            LOMAR,
            [
                *("data.shards=none", "model.arch=vit_small", f"train.ds_config=zero{stage}"),
                *(f"train.global_batch_size={2 * ranks}", "train.gradient_accumulation_steps=2"),
            ],
        )
        trace, zero = trace_method(config), own_zero(config)
        measured = measure_step(config, ranks)
        memory = step_memory(trace, ON_CPU, zero, ranks, images=1)
        assumed = CONTEXT + FRAGMENTATION * memory.activations if memory.activations else CONTEXT
        weights, gradients, optimizer = state_memory(trace.parameters, zero, ranks)
        # Stage 3 keeps the memory of its gradients and its bucket between steps.
        after = weights + optimizer + (gradients + 4 * zero.bucket if stage == 3 else 0)
        name = f"ZeRO {stage}, {ranks} rank{'s' if ranks > 1 else ''}"
        rows.append(Row("memory", f"{name}: after a step", "MB", measured.after / 1e6, after / 1e6))
        rows.append(Row("memory", f"{name}: peak", "MB", measured.peak / 1e6, (memory.total - assumed) / 1e6))
    return rows


AUTHORS = ON_CPU
A100 = Cluster(GPUS["a100"], 4, 4, 1600)
V100 = Cluster(replace(GPUS["v100"], bf16=True), 8, 8, 100)  # the authors' fp16 autocast costs the same as bf16
# A TPU v3 core: half of a chip's 123 TFLOP/s and 900 GB/s (Google Cloud's documentation). XLA fuses what it can.
TPU = Cluster(GPU(61.5, 0.8, 4, 450, 16, nvlink=70, pcie=16, network=10_000), 128, 128, 10_000)


def plan(cluster: Cluster, numerics: Numerics, recipe: str, *overrides: str) -> Plan:
    config = load(recipe, ["data.shards=none", "data.num_workers=1000", *overrides])
    return make_plan(config, cluster, IMAGENET, numerics, trace_method(config))


def lomar(*overrides: str) -> Plan:
    return plan(A100, AUTHORS, LOMAR, "train.gradient_accumulation_steps=4", *overrides)


def mae(*overrides: str) -> Plan:
    return plan(A100, AUTHORS, MAE, "train.gradient_accumulation_steps=8", *overrides)


def vit_small(numerics: Numerics) -> Plan:
    """Plans SimMIM with a ViT-S, which encodes all 196 patches like a classifier."""
    overrides = ("model.arch=vit_small", "train.global_batch_size=256", "train.gradient_accumulation_steps=1")
    return plan(Cluster(GPUS["h100"], 1, 1, 400), numerics, SIMMIM, *overrides)


def time_ratio(slow: Plan, fast: Plan) -> float:
    return fast.images_per_second / slow.images_per_second


PUBLISHED: list[tuple[str, str, float, Callable[[], float]]] = [
    ("LoMaR Table 1: LoMaR B, 400 epochs", "h", 66, lambda: lomar().hours),
    ("LoMaR Table 1: LoMaR B/8, 400 epochs", "h", 66, lambda: lomar("model.patch_size=8").hours),
    ("LoMaR Table 1: MAE B, 1600 epochs", "h", 232, lambda: mae().hours),
    (
        "LoMaR Fig. 4: MAE / LoMaR at 384",
        "x",
        2.5,
        lambda: time_ratio(mae("data.image_size=384"), lomar("data.image_size=384", "method.num_windows=6")),
    ),
    (
        "LoMaR Fig. 4: MAE / LoMaR at 448",
        "x",
        3.1,
        lambda: time_ratio(mae("data.image_size=448"), lomar("data.image_size=448", "method.num_windows=9")),
    ),
    ("LoMaR sec. 1: MAE at 384 / at 224", "x", 4.7, lambda: time_ratio(mae("data.image_size=384"), mae())),
    (
        "LoMaR Fig. 5: window 14x14 / 7x7",
        "x",
        2.0,
        lambda: time_ratio(lomar("method.num_windows=1", "method.window_size=14"), lomar()),
    ),
    (
        "LUT sec. 5.1: LUT B, 400 epochs, 8 V100",
        "h",
        119,
        lambda: plan(V100, AUTHORS, "lut_vitb16_224_1600e", "train.epochs=400").hours,
    ),
    ("LUT sec. 5.1: MAE B, 1600 epochs, 8 V100", "h", 223, lambda: plan(V100, AUTHORS, MAE).hours),
    (
        "LoMaR sec. 1: MAE H/14, 128 TPU v3",
        "h",
        34.5,
        lambda: plan(
            TPU, Numerics(True, "fp32", "unfused"), "mae_vith14_224_1600e", "train.epochs=800",
            "train.gradient_accumulation_steps=1",
        ).hours,
    ),
    (
        "DailyMAE: MAE B, 800 epochs, 8 A100",
        "h",
        18,
        lambda: plan(
            Cluster(GPUS["a100"], 8, 8, 1600), Numerics(), MAE, "data.image_size=192", "train.epochs=800"
        ).hours,
    ),
    ("nvSubquadratic: ViT-S, eager, H100", "images/s", 2305, lambda: vit_small(Numerics()).images_per_second),
    (
        "nvSubquadratic: ViT-S, compiled, H100",
        "images/s",
        7716,
        lambda: vit_small(Numerics(compile=True, residual="bf16")).images_per_second,
    ),
]  # fmt: skip


def check_published() -> list[Row]:
    return [Row("published", name, unit, truth, planned()) for name, unit, truth, planned in tqdm(PUBLISHED)]


def check_measured() -> list[Row]:
    return [Row("measured", name, "ms", ms, planned) for name, ms, planned in planned_steps("h200")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    checks: dict[str, Callable[[], list[Row]]] = {
        "counted in the real method": lambda: check_counts(quick),
        "kept, compiled by Inductor": check_compiled,
        "allocated by real engines, ViT-S": lambda: check_memory(quick),
        "published": check_published,
        "measured on an H200": check_measured,
    }
    results = []
    for title, check in checks.items():
        rows = check()
        print(f"\n{title:40}{'true':>12}{'planned':>12} {'':10}{'error':>8}")
        for row in sorted(rows, key=lambda row: row.check):
            print(row)
        results += [{"check": row.check, "name": row.name, "error": round(row.error, 4)} for row in rows]
    print(json.dumps({"quick": quick, "results": results}))


if __name__ == "__main__":
    main()
