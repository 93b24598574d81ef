"""The training steps that the speed benchmarks compare: LoMaR, its fast variants and MAE, built from recipes."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.build import build_method
from pretrain.config import PretrainConfig, load
from pretrain.methods.base import Method
from pretrain.models.vit import ARCHS
from pretrain.numerics import apply_numerics, choose_numerics
from pretrain.trainer.cautions import has_fast_bf16
from pretrain.trainer.cuda_graphs import graph_steps
from pretrain.trainer.optim import build_adamw, parameter_groups

LOMAR, MAE = "lomar_vitb16_224_400e", "mae_vitb16_224_1600e"
NAMES = {
    "lomar": "LoMaR",
    "late": "LoMaR, late mask tokens",
    "pr": "LoMaR + PR-MIM 50 %",
    "fast": "LoMaR, late + PR-MIM",
    "mae": "MAE",
}
WINDOWS = {224: 4, 384: 6, 448: 9}  # Fig. 4 of LoMaR
Loss = Callable[[], Tensor]


def image_side(arch: str, size: int) -> int:
    """`size`, rounded down to a multiple of the patch size: 378 instead of 384 for ViT-H/14."""
    return size // patch_size(arch) * patch_size(arch)


def patch_size(arch: str) -> int:
    return 14 if arch == "vit_huge" else 16


def load_variant(variant: str, arch: str, size: int, *overrides: str) -> PretrainConfig:
    """The configuration of a variant in `NAMES` at a size in `WINDOWS`; `late` is after two thirds of the blocks."""
    keys = [
        "data.shards=none",
        f"model.arch={arch}",
        f"model.patch_size={patch_size(arch)}",
        f"data.image_size={image_side(arch, size)}",
        "optim.base_lr=1e-6",  # on random images, the recipe's rate would diverge without its warm-up
        *overrides,
    ]
    if variant == "mae":
        return load(MAE, keys)
    keys.append(f"method.num_windows={WINDOWS[size]}")
    if variant in ("late", "fast"):
        keys.append(f"method.mask_token_block={ARCHS[arch].depth * 2 // 3}")
    if variant in ("pr", "fast"):
        keys.append("pr_mim.throw_ratio=0.5")
    return load(LOMAR, keys)


def build(config: PretrainConfig, device: torch.device) -> Method:
    """The method, initialized on the device, with the kernels and compilation of a run with ZeRO stage 0 there."""
    with device:
        method = build_method(config)
    assert isinstance(method, Method)
    numerics = choose_numerics(config, device, stage=0)
    apply_numerics(method, numerics)
    if numerics.cuda_graphs:
        graph_steps(method, stage=0)
    return method.to(device)


def draw_batch(method: Method, config: PretrainConfig, images: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Random pixels and the method's mask indices, on the method's device."""
    device = next(method.parameters()).device
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (images, *config.data.height_width, 3), generator=generator, dtype=torch.uint8)
    sampler = method.mask_sampler()
    samples = [sampler(np.random.default_rng(i)) for i in range(images)]
    indices = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
    return pixels.to(device), {name: array.to(device) for name, array in indices.items()}


@dataclass
class Trainee:
    """A model that repeatedly trains on the same batch.

    Attributes:
        model: what `loss` calls.
        loss: the forward pass on the batch, without autocast.
        images: number of images in the batch.
        needs_bf16: whether it computes in bf16 even on a CPU that is slow in it.
    """

    model: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer
    images: int
    device: torch.device
    needs_bf16: bool = False

    def autocast_loss(self) -> Tensor:
        enabled = self.needs_bf16 or has_fast_bf16(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            return self.loss()

    def step(self) -> None:
        self.autocast_loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def forward_flops(self) -> float:
        """Counted FLOPs of one image's forward pass; a step has three times as many.

        Not all of torch's fused kernels are counted, so attention runs without them here.
        """
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.autocast_loss()
        return counter.get_total_flops() / self.images


def trainee(config: PretrainConfig, images: int, device: torch.device, fused: bool = True) -> Trainee:
    """A method of this project with its optimizer: AdamW in one kernel (`fused`) or, as before, in several."""
    method = build(config, device)
    batch = draw_batch(method, config, images)
    groups = parameter_groups(method, config.optim.weight_decay)
    if fused:
        optimizer = build_adamw(groups, config, stage=1)
    else:
        optimizer = torch.optim.AdamW(groups, lr=config.peak_lr, betas=config.optim.betas, foreach=True)
    needs_bf16 = config.model.residual == "bf16"
    return Trainee(method, lambda: method(*batch)["loss"], optimizer, images, device, needs_bf16)
