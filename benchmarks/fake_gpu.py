"""Runs a method on a fake GPU: shapes, dtypes and kernels as on a real one, without numbers and memory.

The device determines which of torch's operators run and what they keep for the backward pass. Fake tensors take the
same code paths as a GPU's, in bf16 under autocast, in milliseconds even for ViT-H.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.saved import saved_storages
from pretrain.build import build_ema, build_method, feature_teacher, untrained_teacher
from pretrain.config import PretrainConfig
from pretrain.methods.base import Method
from pretrain.methods.lut import LUT
from pretrain.methods.targets.features import EMAConfig, FeatureTarget, TeacherConfig
from pretrain.models import patches, sdpa, window_attention
from pretrain.models.vit import ARCHS
from pretrain.trainer.ema import NoEMA

GPU = torch.device("cuda", 0)
FAKE = FakeTensorMode()  # one for the process: fake tensors of two modes do not mix


class _Uninitialized(TorchFunctionMode):
    """Skips weight initialization, which takes most of the time when building a large model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.uniform_, Tensor.normal_) or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def build(config: PretrainConfig) -> tuple[Method | LUT, NoEMA]:
    """A method and its teacher, if it has one, on the fake GPU."""
    with _Uninitialized():
        method = build_method(config, untrained_teacher(config))
        ema = build_ema(config, method, torch.device("cpu"))
    for module in dict.fromkeys((method, ema.model, feature_teacher(method))):
        if module is not None:
            _replace_tensors(module)
    return method, ema


def _replace_tensors(module: nn.Module) -> None:
    with FAKE:
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype, device=GPU)
                    part._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=GPU)


@contextmanager
def _autocast() -> Iterator[None]:
    """Enables CUDA autocast without a GPU, where `torch.autocast` would disable itself."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def _tables_of_places(size: int, device: torch.device, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """Replaces the window kernel's tables, which are made from real numbers."""
    shape = window_attention.PLACES, window_attention.PLACES
    return (
        torch.empty(shape, dtype=torch.int8, device=device),
        torch.empty(2, 3, *shape, dtype=torch.int8, device=device),
    )


@contextmanager
def _fake_gpu() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(FAKE)
        stack.enter_context(_autocast())
        stack.enter_context(mock.patch.object(sdpa, "_deterministic", True))
        stack.enter_context(mock.patch.object(window_attention, "_tables", _tables_of_places))
        # Bypass its cache, where fake tensors must not end up.
        stack.enter_context(mock.patch.object(patches, "_pixel_statistics", patches._pixel_statistics.__wrapped__))
        yield


def _efficient_attention_flops(q: tuple[int, ...], k: tuple[int, ...], *_: object, **__: object) -> int:
    """Replaces torch's formula, which mistakes heads for tokens here; q and k are (B, L, H, C)."""
    B, L, H, C = q
    return 4 * B * H * L * k[1] * C


FORMULAS = {torch.ops.aten._efficient_attention_forward: _efficient_attention_flops}


class Count(NamedTuple):
    """FLOPs and kept memory of one image's forward pass."""

    flops: float
    kept: float  # bytes kept for the backward pass


def count(config: PretrainConfig, window_kernel: bool = False) -> Count:
    """The cost of one more image, without the bf16 copies of the weights, which all images share.

    The encoder's blocks before mask tokens enter are alike, and so are those after: at most two of either kind are
    counted, and the second one's difference stands for the others. A teacher's operations count as a third, because
    they have no backward pass. FLOPs of the window kernel are not counted; get those with `window_kernel=False`.
    """
    if _needs_all_blocks(config):
        return _count_image(config, (0, ARCHS[config.model.arch].depth), window_kernel)
    late = getattr(config.method, "mask_token_block", 0)
    missing = max(late - 1, 0), ARCHS[config.model.arch].depth - late - 1
    few = (min(late, 1), 1)
    total = base = _count_image(config, few, window_kernel)
    for number, more in zip(missing, ((few[0] + 1, 1), (few[0], 2)), strict=True):
        if number:
            counted = _count_image(config, more, window_kernel)
            total = Count(*(t + number * (c - b) for t, c, b in zip(total, counted, base, strict=True)))
    return total


def _needs_all_blocks(config: PretrainConfig) -> bool:
    """Whether the method uses outputs of specific blocks of the encoder or a teacher, so none can be left out."""
    named = getattr(config.method, "blocks", None) or isinstance(config.target, TeacherConfig | EMAConfig)
    return bool(named) or config.method.name == "mff"


def _count_image(config: PretrainConfig, blocks: tuple[int, int], window_kernel: bool) -> Count:
    """Counts an image with these numbers of blocks before and after mask tokens enter."""
    name = config.model.arch
    if blocks[0]:
        config = config.model_copy(update={"method": config.method.model_copy(update={"mask_token_block": blocks[0]})})
    with mock.patch.dict(ARCHS, {name: ARCHS[name]._replace(depth=sum(blocks))}):
        method, ema = build(config)
    method.encoder.window_kernel = window_kernel
    one, two = (_count_batch(config, method, ema, batch) for batch in (1, 2))
    return Count(two.flops - one.flops, two.kept - one.kept)


def _count_batch(config: PretrainConfig, method: Method | LUT, ema: NoEMA, batch: int) -> Count:
    views = (len(config.augmentations),) if config.lut else ()
    sample = method.mask_sampler()(np.random.default_rng(0))
    with _fake_gpu():
        images = torch.empty(
            batch, *views, *config.data.height_width, config.data.channels, dtype=torch.uint8, device=GPU
        )
        indices = {
            name: torch.empty(batch, *array.shape, dtype=torch.int64, device=GPU) for name, array in sample.items()
        }
        with _flops() as teacher:
            teacher_outputs = ema.model_inputs(images)
        with _flops() as forward, _flops_of_targets() as targets, saved_storages(method) as saved:
            method(images, indices, **teacher_outputs)
        without_backward = teacher.get_total_flops() + sum(targets)
        return Count(forward.get_total_flops() - sum(targets) + without_backward / 3, sum(saved.values()))


def _flops() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=FORMULAS)


@contextmanager
def _flops_of_targets() -> Iterator[list[int]]:
    """Collects the FLOPs of each teacher call within the context."""
    found = []

    def counted(target: FeatureTarget, compute: Callable[..., Any], *args: Any) -> Any:
        with _flops() as counter:
            computed = compute(target, *args)
        found.append(counter.get_total_flops())
        return computed

    with ExitStack() as stack:
        for name in ("ground_truth", "with_attention"):
            compute = functools.partialmethod(counted, getattr(FeatureTarget, name))
            stack.enter_context(mock.patch.object(FeatureTarget, name, compute))
        yield found
