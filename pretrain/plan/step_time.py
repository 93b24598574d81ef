"""The time of an optimizer step, by part."""

from dataclasses import dataclass

from data.cores import AUTO, MOST_WORKERS
from pretrain.config import PretrainConfig
from pretrain.plan.block_cost import (
    Numerics,
    attention_bytes,
    attention_flops,
    attention_work,
    elementwise_bytes,
    kernel,
    matrix_flops,
)
from pretrain.plan.communication import Communication, step_communication
from pretrain.plan.hardware import GPU, Cluster, stream_rate
from pretrain.plan.loader_cost import IMAGENET, Photographs, core_seconds
from pretrain.plan.memory import Zero
from pretrain.plan.trace import BlockCall, Trace

# The share of the best matrix product's rate that a block of width D reaches, with 51,200 tokens at a time.
_WIDTH_SHARE = ((192, 0.50), (384, 0.65), (512, 0.72), (768, 0.80), (1024, 0.84), (1280, 0.86))
ENDS_SHARE = 0.7  # the same for products outside the blocks
DEPTHWISE_SHARE = 0.11  # of the fp32 peak outside tensor cores that cuDNN's depth-wise convolution reaches
ATTENTION_SHARE = 0.35  # of the best matrix product's rate that attention kernels reach
_SLOWER = {"triton": 1.25, "sdpa": 1.35, "unfused": 1.0}  # than the time that attention's bytes take
COMPILED_ENDS = 1 / 3  # of the bytes of the ends, once compiled
# Seconds of the host to launch a block's two passes: eager, compiled, and compiled with the window kernel.
HOST_EAGER, HOST_COMPILED, HOST_WINDOWS = 3.2e-3, 2.4e-3, 3.0e-3
MEASURED = 1.15  # an H200's time relative to these formulas in eight steps: 1.09 to 1.25
BETWEEN_STEPS = {True: 16e-3, False: 0.3e-3}  # seconds; DeepSpeed's ZeRO optimizers wait for the gradient's norm
ADAMW_BYTES = 32  # per parameter, fused, with the norm
ZERO_BYTES = 40  # per parameter: what ZeRO's flat copies move
CAST_BYTES = 18  # per parameter: to bf16, and its gradient back
AVERAGE_BYTES = 12  # per parameter of a teacher
HOST_RATE = 20e9  # bytes a second of the host's memory for each GPU, a guess; AdamW runs there with offload_optimizer


@dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step, by part.

    Attributes:
        matrices: matrix products in the blocks and outside them.
        attention: its core, between the qkv and the output projection.
        elementwise: all other operators of the blocks.
        convolution: PR-MIM's depth-wise one, both passes.
        ends: all other operators outside the blocks.
        recomputed: the forward passes of the encoder's blocks that `model.grad_checkpointing` repeats.
        casts: weights to bf16, and their gradients back.
        optimizer: AdamW, ZeRO's copies, a teacher's average.
        communication: what the backward pass does not hide.
        host: the GPU waits for the host to launch kernels.
        data: the GPU waits for the loader.
    """

    matrices: float
    attention: float
    elementwise: float
    convolution: float
    ends: float
    recomputed: float
    casts: float
    optimizer: float
    communication: float
    host: float
    data: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    @property
    def limits(self) -> dict[str, float]:
        """Seconds of a step by what limits them."""
        memory = self.attention + self.elementwise + self.ends + self.recomputed + self.casts + self.optimizer
        return {
            "compute": self.matrices + self.convolution,
            "memory bandwidth": memory,
            "communication": self.communication,
            "launching kernels": self.host,
            "data": self.data,
        }


def peak(gpu: GPU, numerics: Numerics) -> float:
    """TFLOP/s of matrix products by the data sheet."""
    return gpu.tflops if numerics.precision == "bf16" else gpu.fp32_tflops


def image_flops(trace: Trace) -> float:
    """Model flops of an image in a training step."""
    flops = trace.ends.forward_flops + trace.ends.backward_flops
    for call in trace.calls:
        tokens = call.blocks * call.sequences * call.tokens
        flops += (3 if call.backward else 1) * tokens * (matrix_flops(call) + attention_flops(call))
    return flops


def step_time(
    config: PretrainConfig,
    cluster: Cluster,
    numerics: Numerics,
    zero: Zero,
    trace: Trace,
    micro_batch: int,
    photographs: Photographs = IMAGENET,
) -> tuple[Step, Communication]:
    """An optimizer step of the configuration with micro-batches of `micro_batch` images on each GPU."""
    gpu, times = cluster.gpu, config.train.gradient_accumulation_steps
    rate = stream_rate(gpu)
    forward, backward, recomputed = _passes(trace, numerics, gpu, micro_batch)
    if not config.model.grad_checkpointing:
        recomputed = 0.0
    ends_bytes = (trace.ends.bytes - trace.ends.depthwise.bytes) * micro_batch + trace.ends.fixed_bytes
    ends = ends_bytes * (COMPILED_ENDS if numerics.compile else 1) / rate
    convolution = _depthwise_seconds(trace, gpu, micro_batch)
    casts = CAST_BYTES * trace.parameters / rate if numerics.precision == "bf16" else 0.0
    forward, backward = ({part: MEASURED * s for part, s in one.items()} for one in (forward, backward))
    ends, convolution, recomputed, casts = (MEASURED * s for s in (ends, convolution, recomputed, casts))
    outside = ends + convolution
    busy = sum(forward.values()) + sum(backward.values()) + recomputed + outside + casts
    optimizer = _optimizer(trace, zero, cluster)
    communication = step_communication(
        trace.parameters,
        zero,
        cluster,
        times,
        sum(forward.values()) + outside / 3,
        sum(backward.values()) + recomputed + outside * 2 / 3,
    )
    host = times * max(_host_seconds(trace, numerics, config) - busy, 0.0) + BETWEEN_STEPS[zero.stage > 0]
    computed = times * busy + optimizer + communication.exposed + host
    loaded = _loader_seconds(config, cluster, photographs)
    step = Step(
        matrices=times * (forward["matrices"] + backward["matrices"]),
        attention=times * (forward["attention"] + backward["attention"]),
        elementwise=times * (forward["elementwise"] + backward["elementwise"]),
        convolution=times * convolution,
        ends=times * ends,
        recomputed=times * recomputed,
        casts=times * casts,
        optimizer=optimizer,
        communication=communication.exposed,
        host=host,
        data=max(loaded - computed, 0.0),
    )
    return step, communication


def _passes(
    trace: Trace, numerics: Numerics, gpu: GPU, micro_batch: int
) -> tuple[dict[str, float], dict[str, float], float]:
    """Seconds of a micro-batch's forward and backward pass, and of what checkpointing recomputes.

    That is the forward pass of the encoder's blocks, not of a teacher's or decoder's.
    """
    best, rate = peak(gpu, numerics) * 1e12 * gpu.gemm_share, stream_rate(gpu)
    forward, backward = (dict.fromkeys(("matrices", "attention", "elementwise"), 0.0) for _ in range(2))
    ends = trace.ends
    forward["matrices"] = micro_batch * (ends.forward_flops - ends.depthwise.flops) / (best * ENDS_SHARE)
    backward["matrices"] = micro_batch * (ends.backward_flops - 2 * ends.depthwise.flops) / (best * ENDS_SHARE)
    recomputed = 0.0
    for call in trace.calls:
        tokens = micro_batch * call.blocks * call.sequences * call.tokens
        matrices = tokens * matrix_flops(call) / (best * _width_share(call.dim))
        moved, attention = elementwise_bytes(call, numerics), _attention_seconds(call, numerics, best, rate)
        forward["matrices"] += matrices
        forward["attention"] += tokens * attention[0]
        forward["elementwise"] += tokens * moved.forward / rate
        if call.backward:
            backward["matrices"] += 2 * matrices
            backward["attention"] += tokens * attention[1]
            backward["elementwise"] += tokens * moved.backward / rate
        if call.backward and call.encoder:
            recomputed += matrices + tokens * (attention[0] + moved.forward / rate)
    return forward, backward, recomputed


def _depthwise_seconds(trace: Trace, gpu: GPU, micro_batch: int) -> float:
    """Seconds of both passes; tensor cores do not help where each channel is a product of its own."""
    depthwise = trace.ends.depthwise
    computed = 3 * depthwise.flops / (gpu.fp32_tflops * 1e12 * DEPTHWISE_SHARE)
    return micro_batch * max(depthwise.bytes / stream_rate(gpu), computed)


def _attention_seconds(call: BlockCall, numerics: Numerics, best: float, rate: float) -> tuple[float, float]:
    """Forward and backward seconds for each token: its bytes or its products, whichever take longer."""
    moved, work = attention_bytes(call, numerics), attention_work(call, numerics)
    slower = _SLOWER[kernel(call, numerics)] / rate
    forward, backward = (
        max(moved_bytes * slower, flops / (best * ATTENTION_SHARE))
        for moved_bytes, flops in zip(moved, work, strict=True)
    )
    return forward, backward


def _width_share(dim: int) -> float:
    """Interpolates linearly between the widths of `_WIDTH_SHARE`."""
    widths, shares = zip(*_WIDTH_SHARE, strict=True)
    above = next((i for i, width in enumerate(widths) if width >= dim), len(widths) - 1)
    if above == 0 or widths[above] <= dim:
        return float(shares[above])
    part = (dim - widths[above - 1]) / (widths[above] - widths[above - 1])
    return float(shares[above - 1] + part * (shares[above] - shares[above - 1]))


def _optimizer(trace: Trace, zero: Zero, cluster: Cluster) -> float:
    rate, share = stream_rate(cluster.gpu), trace.parameters / (cluster.gpus if zero.stage else 1)
    seconds = AVERAGE_BYTES * trace.averaged / rate
    if zero.stage:
        seconds += ZERO_BYTES * (share if zero.stage == 3 else trace.parameters) / rate
    if zero.offload_optimizer:  # gradients to the host, weights back, by PCIe
        return seconds + 2 * 4 * share / (cluster.gpu.pcie * 1e9) + ADAMW_BYTES * share / HOST_RATE
    return seconds + ADAMW_BYTES * share / rate


def _host_seconds(trace: Trace, numerics: Numerics, config: PretrainConfig) -> float:
    """Seconds that the host needs to launch a micro-batch's kernels, while the GPU computes."""
    if numerics.cuda_graphs:
        return 0.0
    seconds = 0.0
    for call in trace.calls:
        recomputed = config.model.grad_checkpointing and call.encoder and call.backward
        passes = (1.0 if call.backward else 1 / 3) + (1 / 3 if recomputed else 0.0)
        compiled = HOST_WINDOWS if kernel(call, numerics) == "triton" else HOST_COMPILED
        seconds += call.blocks * passes * (compiled if numerics.compile else HOST_EAGER)
    return seconds


def _loader_seconds(config: PretrainConfig, cluster: Cluster, photographs: Photographs) -> float:
    """Seconds that `data.num_workers` processes of each rank need for a step's images; `auto` means `MOST_WORKERS`."""
    data, samples = config.data, config.train.global_batch_size / cluster.gpus
    seconds = core_seconds(data.height_width, config.augmentations, data.repeats, photographs)
    workers = MOST_WORKERS if data.num_workers == AUTO else data.num_workers
    return samples * seconds / max(workers, 1)
