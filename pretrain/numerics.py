"""Chooses how a step is computed where the configuration leaves it open: kernels, compilation, precision.

Other choices give other bits, so a run records its own, and resumes with others only if it is told to.
"""

import os
import shutil
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import nn
from torch.utils._triton import has_triton

from data.decode import DECODER
from data.draw import MASKS
from pretrain.config import PretrainConfig
from pretrain.methods.targets import PatchTarget
from pretrain.models.cross_decoder import CrossBlock
from pretrain.models.sdpa import set_deterministic
from pretrain.models.vit import ARCHS, Block, PatchEmbed, ViT
from pretrain.models.window_attention import MAX_HEAD_DIM, MAX_PREFIX_TOKENS, MAX_WINDOW_SIZE, worst_error

_KERNEL_TOLERANCE = 0.02  # relative; rounding to bf16 gives 0.004


@dataclass(frozen=True)
class Numerics:
    """The choices made.

    Attributes:
        compile: whether blocks, the patch embedding and the loss are compiled.
        attention: `triton`, the kernel for windows, or `sdpa`.
        residual: `fp32` or `bf16`.
        sdpa: torch's kernel on a GPU: `efficient` (the memory-efficient one, deterministic) or `fastest` (torch's
            choice); `cpu` without a GPU.
        masks: how masks are drawn in the data workers.
        decoder: what decodes and resizes images there.
        cuda_graphs: whether each pass of the method is a CUDA graph.
        why_sdpa: why the kernel for windows is not used; empty if it is.
    """

    compile: bool
    attention: str
    residual: str
    sdpa: str
    masks: str = MASKS
    decoder: str = DECODER
    cuda_graphs: bool = False
    why_sdpa: str = ""

    def signature(self) -> dict[str, Any]:
        """What a checkpoint records."""
        return {key: value for key, value in asdict(self).items() if key != "why_sdpa"}


def choose_numerics(config: PretrainConfig, device: torch.device, stage: int) -> Numerics:
    """Resolves `model.compile`, `cuda_graphs` and `attention` and `train.deterministic` for a device and a ZeRO stage.

    Raises:
        ValueError: a setting that cannot work here; the message names the key to change.
    """
    model, cuda = config.model, device.type == "cuda"
    if cuda and config.train.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"{name} does not support bf16: set train.precision=fp32 (GPUs since the A100 do)")
    if model.cuda_graphs == "on" and not cuda:
        raise ValueError("model.cuda_graphs=on needs a GPU: set model.cuda_graphs=auto")
    check_settings(config, stage)
    obstacle = window_kernel_obstacle(config, device)
    if model.attention == "triton" and obstacle:
        raise ValueError(f"model.attention=triton cannot be used: {obstacle}; set model.attention=auto")
    return Numerics(
        compile=_choose_compile(model.compile, device, stage),
        attention="triton" if model.attention != "sdpa" and not obstacle else "sdpa",
        residual=model.residual,
        sdpa=("efficient" if config.train.deterministic else "fastest") if cuda else "cpu",
        cuda_graphs=cuda and wants_cuda_graphs(config, stage),
        why_sdpa="model.attention=sdpa" if model.attention == "sdpa" else obstacle,
    )


def check_settings(config: PretrainConfig, stage: int) -> None:
    """Raises ValueError for settings that cannot work together on any device."""
    if config.model.residual == "bf16" and config.train.precision != "bf16":
        raise ValueError("model.residual=bf16 needs train.precision=bf16")
    if config.earlier and stage == 3:
        raise ValueError(
            f"data.size_schedule={config.data.size_schedule} builds one method per size with shared weights, but "
            f"ZeRO stage 3 partitions those of only one: set train.ds_config=zero2, or leave the schedule out"
        )
    if config.model.compile == "on" and stage == 3:
        raise ValueError(
            "model.compile=on silently loses gradients in ZeRO stage 3 with DeepSpeed 0.19.8: set "
            "model.compile=off, or train.ds_config=zero2"
        )
    if config.model.cuda_graphs == "on" and (obstacle := cuda_graphs_obstacle(config, stage)):
        raise ValueError(f"model.cuda_graphs=on cannot be used: {obstacle}; set model.cuda_graphs=auto")


def wants_cuda_graphs(config: PretrainConfig, stage: int) -> bool:
    """Whether steps on a GPU are CUDA graphs. `auto` excludes a user's own method: it must be tried first."""
    if config.model.cuda_graphs == "auto":
        return not config.method.module and not cuda_graphs_obstacle(config, stage)
    return config.model.cuda_graphs == "on"


def cuda_graphs_obstacle(config: PretrainConfig, stage: int) -> str:
    """Why the steps of a configuration cannot be CUDA graphs on any device; empty if they can."""
    if stage == 3:
        return "ZeRO stage 3 gathers and frees the weights of each block"
    if config.model.grad_checkpointing:
        return "model.grad_checkpointing=true sets random states in the middle of a pass"
    if config.earlier:
        return "data.size_schedule has images of several sizes, but a graph records only one"
    if config.lut:
        return "LUT's ranks exchange statistics in the middle of a pass"
    return ""


def _choose_compile(wish: str, device: torch.device, stage: int) -> bool:
    obstacle = _compiler_obstacle()
    if wish == "on" and obstacle:
        raise ValueError(f"model.compile=on cannot be used: {obstacle}; install it, or set model.compile=off")
    return wish == "on" or (wish == "auto" and device.type == "cuda" and stage < 3 and not obstacle)


def _compiler_obstacle() -> str:
    """What is missing to compile at run time: torch and Triton compile C code that launches their kernels."""
    if torch.cuda.is_available() and not has_triton():
        return "Triton is not installed"
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return "there is no C compiler (gcc)"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.is_file() else f"{header} is missing (system package python3-dev or python3-devel)"


def window_kernel_obstacle(config: PretrainConfig, device: torch.device) -> str:
    """Why the kernel for windows cannot be used on a device; empty if it can."""
    if unserved := unserved_by_window_kernel(config):
        return unserved
    if device.type != "cuda":
        return f"it runs on GPUs, not on the {device.type.upper()}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs a GPU of compute capability 8.0 (A100) or higher, not {torch.cuda.get_device_name(device)}"
    return _compiler_obstacle()


def unserved_by_window_kernel(config: PretrainConfig) -> str:
    """Why the kernel for windows cannot be used on any device; empty if it can, at all sizes of images."""
    for _, earlier in config.earlier:
        if obstacle := unserved_by_window_kernel(earlier):
            return obstacle
    rows, cols = config.method.sequence_grid(config.grid)
    arch = ARCHS[config.model.arch]
    if config.model.position != "relative":
        return f"it only supports model.position=relative, not {config.model.position}"
    if config.model.registers >= MAX_PREFIX_TOKENS:
        return f"it supports up to {MAX_PREFIX_TOKENS - 1} registers, not model.registers={config.model.registers}"
    if rows != cols or rows > MAX_WINDOW_SIZE:
        return f"it supports windows of up to {MAX_WINDOW_SIZE}x{MAX_WINDOW_SIZE} patches, not {rows}x{cols}"
    if arch.dim // arch.heads > MAX_HEAD_DIM:
        return f"it supports heads of up to {MAX_HEAD_DIM} channels, not {arch.dim // arch.heads}"
    if config.train.precision != "bf16":
        return f"it computes in bf16, not train.precision={config.train.precision}"
    return ""


def check_window_kernel(config: PretrainConfig, device: torch.device) -> None:
    """Compares the kernel with the formula on this very device, before hours are spent on it.

    Raises:
        ValueError: it does not compile, does not run or is wrong here.
    """
    arch, (size, _) = ARCHS[config.model.arch], config.method.sequence_grid(config.grid)
    patches, masked = config.method.count_patches(config.grid, config.model.patch_size)
    kept = config.pr_mim.num_kept(patches, masked) if config.pr_mim else masked
    failure = None
    try:
        # Only the visible patches, before mask tokens enter, and all that enter: each count has its own kernels.
        errors = [
            worst_error(
                size, count, arch.heads, arch.dim // arch.heads, device, torch.bfloat16, 1 + config.model.registers
            )
            for count in (patches - masked, patches - masked + kept)
        ]
        error = next((error for error in errors if not error < _KERNEL_TOLERANCE), 0.0)
        problem = f"its relative error is {error:.1e}" if error else ""
    except torch.OutOfMemoryError:
        raise
    except Exception as raised:  # Triton's errors have no common base class
        failure, problem = raised, f"{type(raised).__name__}: {raised}".splitlines()[0]
    if problem:
        message = f"the kernel for attention in windows does not work here ({problem}): set model.attention=sdpa"
        raise ValueError(message) from failure


def apply_numerics(module: nn.Module, numerics: Numerics) -> None:
    """Prepares a method, or a teacher, before the engine is built.

    A copy made afterwards is not compiled: torch does not copy the compiled code.
    """
    set_deterministic(numerics.sdpa == "efficient")
    options = _compiler_options(numerics) if numerics.compile else {}
    for part in module.modules():
        if isinstance(part, ViT):
            part.window_kernel = numerics.attention == "triton"
            part.residual_dtype = torch.bfloat16 if numerics.residual == "bf16" else None
        if numerics.compile and isinstance(part, Block | CrossBlock | PatchEmbed):
            part.compile(dynamic=False, options=options)  # one graph for all blocks of a shape
        target = getattr(part, "target", None)
        if numerics.compile and isinstance(target, PatchTarget):
            target.loss = torch.compile(target.loss, dynamic=False, options=options)  # type: ignore[method-assign]


def _compiler_options(numerics: Numerics) -> dict[str, Any]:
    """Options of torch's Inductor, which times kernels with different summation orders unless it is deterministic."""
    known = numerics.sdpa == "efficient" and "deterministic" in torch._inductor.list_options()  # since torch 2.10
    return {"deterministic": True} if known else {}
