"""Memory of a GPU by ZeRO stage, and the largest micro-batch that fits.

The formulas are those of DeepSpeed 0.19 with fp32 parameters (autocast) and torch's fused AdamW;
`benchmarks/plan_check.py` compares them with what real engines allocate.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from pretrain.plan.block_cost import Numerics, input_bytes, kept_bytes, table_gradient_bytes
from pretrain.plan.trace import Trace

GIB = 2.0**30
CONTEXT = 1.0 * GIB  # CUDA's context, the libraries' workspaces and NCCL's buffers
FRAGMENTATION = 0.05  # of what is allocated anew in each step
DEFAULT_BUCKET = 500_000_000  # elements, if the engine keys set none
LIVE, PREFETCH = 1_000_000_000, 50_000_000  # elements: stage 3's max_live_parameters and prefetch_bucket_size
_FP32 = 4


@dataclass(frozen=True)
class Zero:
    """DeepSpeed's keys that determine memory and communication.

    Attributes:
        bucket: elements of a reduction.
        overlap: whether reductions overlap with the backward pass, which takes two buckets.
        offload_optimizer, offload_parameters: whether these are in the host's memory.
    """

    stage: int
    bucket: int = DEFAULT_BUCKET
    overlap: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @classmethod
    def of(cls, keys: dict[str, Any]) -> "Zero":
        """From the keys of a file in ds_configs/."""
        zero = keys.get("zero_optimization", {})
        stage = int(zero.get("stage", 0))
        return cls(
            stage=stage,
            bucket=int(zero.get("reduce_bucket_size", DEFAULT_BUCKET)),
            overlap=bool(zero.get("overlap_comm", stage == 3)) and stage > 0,
            offload_optimizer=zero.get("offload_optimizer", {}).get("device") == "cpu",
            offload_parameters=zero.get("offload_param", {}).get("device") == "cpu",
        )


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the peak of a step, by purpose.

    Attributes:
        optimizer: AdamW's two moments and, from stage 1 on, its own copy of this rank's share of the weights.
        deepspeed: buckets, flat copies, and the weights that stage 3 has gathered.
        casts: the bf16 copies of weights that autocast makes in the forward pass.
        activations: kept for the backward pass.
        workspace: gradients in flight through a block, and memory outside our tensors.
        teacher: the weights of a momentum encoder or of a frozen one.
    """

    weights: float
    gradients: float
    optimizer: float
    deepspeed: float
    casts: float
    activations: float
    workspace: float
    teacher: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def activation_bytes(trace: Trace, numerics: Numerics, checkpointing: bool) -> float:
    """Bytes kept for the backward pass, for each image; with checkpointing, those of one recomputed block included."""
    kept, largest = trace.ends.kept, 0.0
    for call in trace.calls:
        if call.backward:
            tokens = call.sequences * call.tokens
            whole = tokens * kept_bytes(call, numerics)
            if checkpointing and call.encoder:
                largest = max(largest, whole)
                whole = tokens * input_bytes(call, numerics)
            kept += call.blocks * whole
    return kept + largest


def workspace_bytes(trace: Trace, numerics: Numerics) -> float:
    """Bytes that the backward pass of a block needs at once, for each image.

    24 D in the MLP: the gradients of its widest maps (8 + 8 D), of the residual stream and the norms. In attention 12 D
    (the residual stream's 4 D, its output's 2 D, 6 D of q, k and v) and the window kernel's partial table gradients.
    """
    return max(
        (
            max(24.0 * call.dim, 12.0 * call.dim + table_gradient_bytes(call, numerics)) * call.sequences * call.tokens
            for call in trace.calls
            if call.backward
        ),
        default=0.0,
    )


def state_memory(parameters: int, zero: Zero, gpus: int) -> tuple[float, float, float]:
    """Bytes of weights, of gradients between micro-batches, and of the optimizer's state."""
    weights, share = float(_FP32 * parameters), _FP32 * parameters / gpus
    moments, master = 2 * share, share if zero.stage else 0.0
    if zero.stage == 0:
        return weights, weights, 2 * weights
    optimizer = 0.0 if zero.offload_optimizer else moments + master
    if zero.stage == 1:
        return weights, weights, optimizer
    gradients = 0.0 if zero.offload_optimizer else share
    if zero.stage == 2:
        return weights, gradients, optimizer
    return 0.0 if zero.offload_parameters else share, gradients, optimizer


def engine_buffers(parameters: int, zero: Zero, gpus: int) -> tuple[float, float]:
    """Bytes that DeepSpeed adds during the backward pass, and during the optimizer's step."""
    share = _FP32 * parameters / gpus
    bucket = float(_FP32 * zero.bucket)
    if zero.stage == 0:  # gradients are flattened to be reduced, once the activations are freed
        return 0.0, _FP32 * float(min(parameters, DEFAULT_BUCKET))
    flat = 0.0 if zero.offload_optimizer else share  # this rank's gradients as one tensor
    if zero.stage == 3:
        live = float(_FP32 * min(parameters, LIVE))
        if gpus > 1:  # this rank's part of what is gathered at once, as one tensor
            live += _FP32 * min(parameters, PREFETCH) / gpus
        return bucket + live, bucket + flat
    return bucket * (2 if zero.overlap else 1), flat


def step_memory(
    trace: Trace, numerics: Numerics, zero: Zero, gpus: int, images: int, checkpointing: bool = False
) -> Memory:
    """A step's peak with micro-batches of `images`: as the backward pass starts, or in the optimizer's step."""
    weights, gradients, optimizer = state_memory(trace.parameters, zero, gpus)
    if numerics.cuda_graphs:  # the gradients that the graph writes, which are then copied or summed
        weights += _FP32 * trace.parameters
    in_backward, in_step = engine_buffers(trace.parameters, zero, gpus)
    activations = images * activation_bytes(trace, numerics, checkpointing)
    gradients_in_flight = images * workspace_bytes(trace, numerics)
    casts = 2.0 * trace.parameters if numerics.precision == "bf16" else 0.0
    teacher = float(_FP32 * (trace.averaged + trace.frozen))
    fragments = FRAGMENTATION * (activations + gradients_in_flight)
    backward = Memory(
        weights,
        gradients,
        optimizer,
        in_backward,
        casts,
        activations,
        gradients_in_flight + fragments + CONTEXT,
        teacher,
    )
    if zero.stage:  # gradients of other ranks' shares are freed by then
        gradients = min(gradients, _FP32 * trace.parameters / gpus)
    step = Memory(weights, gradients, optimizer, in_step, 0.0, 0.0, CONTEXT, teacher)
    return max(backward, step, key=lambda memory: memory.total)


def largest_micro_batch(
    trace: Trace, numerics: Numerics, zero: Zero, gpus: int, memory: float, checkpointing: bool = False
) -> int:
    """The largest micro-batch that fits into `memory` bytes; 0 if not even one image does."""

    def total(images: int) -> float:
        return step_memory(trace, numerics, zero, gpus, images, checkpointing).total

    if total(1) > memory:
        return 0
    # Linear in the images once the backward pass is the peak, as it is for any number that nearly fills the memory.
    many = 1 << 20
    per_image = (total(2 * many) - total(many)) / many
    fixed = total(many) - many * per_image
    return max(math.floor((memory - fixed) / per_image), 1)
