"""Traces what a method computes, by one forward and backward pass of the real method.

Transformer blocks are recorded and skipped; everything else ("the ends": cutting, embedding, heads, targets, loss) is
counted as it runs. So any method can be planned, the blocks cost nothing to run, and which tokens a method sends where
is not described a second time. The blocks' costs follow from their shapes (`block_cost.py`).

Shapes: B images, R sequences (images or windows), L tokens of a sequence including the class token.
"""

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from data.pixel_format import computable, empty_images
from pretrain.build import build_method, feature_teacher, untrained_teacher
from pretrain.config import PretrainConfig
from pretrain.methods.base import Method
from pretrain.methods.lut import LUT
from pretrain.models.cross_decoder import CrossBlock
from pretrain.models.vit import Block, LayerScale

SIZES = (2, 3)  # of the traced batches: their difference separates costs per image from those per step


@dataclass(frozen=True)
class BlockCall:
    """Identical calls of transformer blocks.

    Attributes:
        sequences: for each image, in one block; a fraction if only some images pass.
        tokens: of a sequence.
        blocks: how many blocks are called like this.
        relative: whether position is contextual and relative.
        encoder: whether it is a block of the encoder, which `model.grad_checkpointing` recomputes.
        backward: whether there is a backward pass; a teacher has none.
        bias: whether a bias that all blocks share is added to the logits.
        layer_scale: whether what the block adds is scaled.
        context, context_dim: number and width of other tokens that these attend to instead of each other.
    """

    sequences: float
    tokens: int
    dim: int
    heads: int
    blocks: int
    relative: bool
    encoder: bool
    backward: bool
    context: int = 0
    context_dim: int = 0
    bias: bool = False
    layer_scale: bool = False


@dataclass(frozen=True)
class Ends:
    """Everything outside the blocks.

    Attributes:
        forward_flops, backward_flops: of matrix products and convolutions, for each image.
        bytes: read and written by all operators of both passes, one after the other; for each image.
        kept: bytes kept for the backward pass, for each image.
        fixed_bytes: read and written once per micro-batch, whatever its size: weights and their gradients.
    """

    forward_flops: float
    backward_flops: float
    bytes: float
    kept: float
    fixed_bytes: float
    depthwise: "Depthwise"


@dataclass(frozen=True)
class Depthwise:
    """The part of the ends that is depth-wise convolutions, PR-MIM's, for each image.

    Attributes:
        flops: of the forward pass; the backward pass has twice as many.
        bytes: read and written in both passes.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class Trace:
    """A method's work.

    Attributes:
        parameters: number of trained parameters.
        averaged: parameters of a teacher that is a moving average.
        frozen: parameters of a frozen teacher.
        image_bytes: of the pixels of a sample on the device, all views.
    """

    calls: tuple[BlockCall, ...]
    ends: Ends
    parameters: int
    averaged: int
    frozen: int
    image_bytes: int


def trace_method(config: PretrainConfig) -> Trace:
    """Traces the method of a configuration on the CPU: tenths of a second, and no memory for the blocks' weights."""
    model = config.model.model_copy(update={"grad_checkpointing": False})
    with _ParametersOnMeta():
        frozen = untrained_teacher(config)
        method = build_method(config.model_copy(update={"model": model}), frozen)
        teacher = method.teacher_model() if isinstance(method, LUT) else None
    averaged = teacher if frozen else teacher or feature_teacher(method)
    calls: Counter[BlockCall] = Counter()
    for module in filter(None, (method, averaged, frozen)):
        _pass_over_blocks(module, calls)
    bf16 = config.train.precision == "bf16"
    counted = []
    for size in SIZES:
        calls.clear()
        method.zero_grad()  # or the second backward pass would add to the first's gradients
        images, mask_indices = _draw_batch(method, config, size)
        counted.append(_run(method, teacher, images, mask_indices, bf16))

    def count(module: nn.Module | None) -> int:
        return sum(p.numel() for p in module.parameters()) if module else 0

    forward, backward, moved, kept, *depthwise = (last - first for first, last in zip(*counted, strict=True))
    return Trace(
        tuple(replace(call, sequences=call.sequences / SIZES[-1], blocks=count) for call, count in calls.items()),
        Ends(forward, backward, moved, kept, counted[0][2] - SIZES[0] * moved, Depthwise(*depthwise)),
        count(method),
        count(averaged),
        count(frozen),
        images[0].nbytes,
    )


def trace_sizes(config: PretrainConfig) -> list[Trace]:
    """`trace_method` at each image size of a configuration, `data.image_size` last."""
    return [trace_method(one) for one in (*(earlier for _, earlier in config.earlier), config)]


class _ParametersOnMeta(TorchFunctionMode):
    """Gives no memory and no initial values to parameters, which modules allocate by `torch.empty`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _pass_over_blocks(module: nn.Module, calls: Counter[BlockCall]) -> None:
    """Makes blocks record their calls and return their input; gives all other modules zero weights on the CPU."""
    inside: set[nn.Module] = set()
    for name, block in module.named_modules():
        if isinstance(block, Block):
            encoder = "encoder.blocks." in name
            block.forward = functools.partial(_record, block, encoder, calls)  # type: ignore[method-assign]
        elif isinstance(block, CrossBlock):
            block.forward = functools.partial(_record_cross, block, calls)  # type: ignore[method-assign]
        else:
            continue
        inside.update(block.modules())
    for other in module.modules():
        if other not in inside:
            for key, parameter in other._parameters.items():
                if parameter is not None and parameter.is_meta:
                    zeros = torch.zeros(parameter.shape)
                    other._parameters[key] = nn.Parameter(zeros, requires_grad=parameter.requires_grad)


def _record(block: Block, encoder: bool, calls: Counter[BlockCall], x: Tensor, position: Any = None) -> Tensor:
    sequences, tokens, dim = x.shape
    relative, backward = block.attn.rpe_k is not None, torch.is_grad_enabled()
    more: Any = {"bias": not relative and position is not None, "layer_scale": isinstance(block.ls1, LayerScale)}
    calls[BlockCall(sequences, tokens, dim, block.attn.heads, 1, relative, encoder, backward, **more)] += 1
    return x


def _record_cross(block: CrossBlock, calls: Counter[BlockCall], x: Tensor, context: Tensor) -> Tensor:
    sequences, tokens, dim = x.shape
    heads, backward = block.cross_attn.heads, torch.is_grad_enabled()
    calls[BlockCall(sequences, tokens, dim, heads, 1, False, False, backward, *context.shape[1:])] += 1
    return _DependOn.apply(x, context)


class _DependOn(torch.autograd.Function):
    """Returns `x`; the backward pass also reaches the context, with zeros that take no memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: Tensor) -> Tensor:
        ctx.shape = context.shape
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_zeros(1).expand(ctx.shape)


def _draw_batch(method: Method | LUT, config: PretrainConfig, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    views = (len(config.augmentations),) if config.lut else ()
    images = empty_images(size, *views, *config.data.height_width, format=config.data.pixels.format)
    samples = [method.mask_sampler()(np.random.default_rng(i)) for i in range(size)]
    return computable(images.zero_()), {
        name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]
    }


def _run(
    method: Method | LUT, teacher: nn.Module | None, images: Tensor, mask_indices: dict[str, Tensor], bf16: bool
) -> tuple[int, ...]:
    """Runs one forward and backward pass.

    Returns:
        Forward flops (including a teacher's) and backward flops, bytes moved, bytes kept for the backward pass, and the
        forward flops and moved bytes of depth-wise convolutions.
    """
    saved, moved = _Saved(method), _Moved()
    with moved:
        with FlopCounterMode(display=False) as forward, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            inputs = {}
            if teacher is not None:
                with torch.no_grad():
                    inputs["teacher_features"] = teacher(images)
            with torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor):
                loss = method(images, mask_indices, **inputs)["loss"]
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    forward_flops = forward.get_total_flops()
    # Torch counts the backward pass of a depth-wise convolution like that of a full convolution.
    backward_flops = backward.get_total_flops() - moved.depthwise_miscounted + 2 * moved.depthwise_flops
    return forward_flops, backward_flops, moved.bytes, saved.bytes, moved.depthwise_flops, moved.depthwise_bytes


class _Saved:
    """The bytes that autograd saves, without the method's own weights."""

    def __init__(self, method: nn.Module):
        self.storages = {p.untyped_storage().data_ptr(): 0 for p in method.parameters() if not p.is_meta}

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


class _Moved(TorchDispatchMode):
    """Counts what operators read and write; views move nothing, and an expanded tensor is read once."""

    bytes = 0
    depthwise_bytes = 0
    depthwise_flops = 0  # forward
    depthwise_miscounted = 0  # backward, as torch counts them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = {t.untyped_storage()._cdata: _size(t) for t in _tensors((args, kwargs))}
        written = {t.untyped_storage()._cdata: _size(t) for t in _tensors(out)}
        if written.keys() - read.keys() or func._schema.is_mutable:  # neither: a view
            moved = sum(read.values()) + sum(written.values())
            self.bytes += moved
            self._count_depthwise(func, args, out, moved)
        return out

    def _count_depthwise(self, func: Any, args: Any, out: Any, moved: int) -> None:
        if func is torch.ops.aten.convolution.default and args[8] > 1:  # groups
            self.depthwise_bytes += moved
            self.depthwise_flops += 2 * out.numel() * args[1][0].numel()
        elif func is torch.ops.aten.convolution_backward.default and args[9] > 1:
            self.depthwise_bytes += moved
            self.depthwise_miscounted += flop_registry[func.overloadpacket](*args, out_val=out)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _size(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
