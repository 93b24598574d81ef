"""A method for images of several sizes (`data.size_schedule`): built once for each size, with shared parameters.

At each size, whatever a method derives from the grid of patches (masks, windows, offsets, where a convolution ends) is
the same as in a run at that size alone. The parameters do not depend on the grid and are trained at all sizes. Absolute
positions are those of the last size, resampled as when an encoder is fine-tuned at another size, so a place in the
image has the same position at every size.

Only the method of the last size belongs to the engine and is in checkpoints. The others are called in its place.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from data.batch import SizedUntil
from pretrain.build import build_method, feature_teacher
from pretrain.config import PretrainConfig
from pretrain.methods.base import Method
from pretrain.methods.lut import LUT
from pretrain.methods.masking import Grid
from pretrain.methods.targets.features import EMAConfig, FeatureTeacher
from pretrain.numerics import Numerics, apply_numerics
from pretrain.size_schedule import Size
from pretrain.trainer.ema import NoEMA

POSITIONS = "pos_embed"  # the name of every table of absolute positions, in encoders and decoders


def build_sizes(
    config: PretrainConfig,
    method: Method | LUT,
    ema: NoEMA,
    numerics: Numerics,
    read_teacher: Callable[[PretrainConfig], FeatureTeacher | None],
) -> list[SizedUntil]:
    """Makes the method, and a moving average that sees images, accept images of all sizes in the configuration.

    Args:
        config: of the run.
        method, ema: for the last size; the engine is not built yet.
        numerics: how a step is computed.
        read_teacher: reads the frozen teacher of a configuration, if it has one.

    Returns:
        What the loader needs to know about the earlier sizes.

    Raises:
        ValueError: a parameter of the method has another shape at another size.
    """
    built, stages = {config.data.height_width: method}, []
    if numerics.compile:  # torch stops compiling for new shapes at this limit
        torch._dynamo.config.recompile_limit *= 1 + len(config.earlier)
    for epoch, earlier in config.earlier:
        size = earlier.data.height_width
        if size not in built:
            built[size] = other = build_method(earlier, read_teacher(earlier))
            _add_size(config, earlier, method, other, ema, numerics)
        stages.append(SizedUntil(epoch, size, built[size].mask_sampler()))
    return stages


def _add_size(
    config: PretrainConfig,
    earlier: PretrainConfig,
    method: Method | LUT,
    other: Method | LUT,
    ema: NoEMA,
    numerics: Numerics,
) -> None:
    """Passes images of an earlier size to the method that was built for that size."""
    teacher, theirs = feature_teacher(method), feature_teacher(other)
    for part in filter(None, (other, theirs)):
        apply_numerics(part, numerics)
    pairs: list[tuple[nn.Module, nn.Module]] = [(method, other)]
    if teacher and theirs and isinstance(config.target, EMAConfig):
        pairs.append((teacher, theirs))
    call_by_size(earlier.data.height_width, Twins(pairs, config.grid, earlier.grid))
    if isinstance(other, LUT) and ema.model is not None:
        averaged = other.teacher_model()
        apply_numerics(averaged, numerics)
        call_by_size(earlier.data.height_width, Twins([(ema.model, averaged)], config.grid, earlier.grid))


class Twins:
    """Modules and their twins, which are built for another size and share the modules' parameters.

    Args:
        pairs: modules and their twins; calls go to the first twin.
        grid, other: of the modules and of their twins.
    """

    def __init__(self, pairs: list[tuple[nn.Module, nn.Module]], grid: Grid, other: Grid):
        self._pairs, self._grids, self._is_called = pairs, (grid, other), False
        self.module, self._twin = pairs[0]
        self._share()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_called:  # the engine may have replaced buffers when it moved the module
            self._share()
            self._is_called = True
        if self._twin.training != self.module.training:
            self._twin.train(self.module.training)
        return self._twin(*args, **kwargs)

    def _share(self) -> None:
        for module, twin in self._pairs:
            share(module, twin, *self._grids)


def call_by_size(size: Size, twins: Twins) -> None:
    """Makes a module's `forward` pass images of the given size, its first argument, to the twin."""
    module = twins.module
    otherwise = module.forward

    def forward(images: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (twins if images.shape[-3:-1] == size else otherwise)(images, *args, **kwargs)

    module.forward = forward


def share(module: nn.Module, twin: nn.Module, grid: Grid, other: Grid) -> None:
    """Gives a twin the module's parameters, its saved buffers, its device, and resampled positions.

    Args:
        module: built for a `grid` of patches.
        twin: the same module, built for the `other` grid.

    Raises:
        ValueError: a parameter has another shape in the twin.
    """
    saved = module.state_dict().keys()
    for name, part in module.named_modules():
        theirs = twin.get_submodule(name)
        for key, parameter in part.named_parameters(recurse=False):
            own: Tensor = getattr(theirs, key)
            if parameter.shape != own.shape:
                raise ValueError(
                    f"data.size_schedule needs parameters that do not depend on the image size, but {name}.{key} is "
                    f"{list(parameter.shape)}, and {list(own.shape)} for {other[0]}x{other[1]} patches: leave it out"
                )
            setattr(theirs, key, parameter)
        for key, buffer in part.named_buffers(recurse=False):
            own = getattr(theirs, key).to(buffer.device)
            if key == POSITIONS and not torch.equal(buffer, own):  # a window's are the same at every size
                own = resample_positions(buffer, grid, other).view_as(own)
            elif f"{name}.{key}".removeprefix(".") in saved:
                own = buffer
            setattr(theirs, key, own)


def resample_positions(table: Tensor, grid: Grid, other: Grid) -> Tensor:
    """Resamples a position table for another grid: (..., P+N, D), the first P rows of no patch -> (1, P+N', D)."""
    prefix = table.shape[-2] - math.prod(grid)
    return resample_abs_pos_embed(
        table.reshape(1, -1, table.shape[-1]),
        list(other),
        old_size=list(grid),
        num_prefix_tokens=prefix,
        interpolation="bicubic",
        antialias=True,
    )
