"""One step of every method on any device and in any precision, compared by the GPU tests."""

import itertools
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.build import build_method, feature_teacher, untrained_teacher
from pretrain.config import PretrainConfig
from pretrain.methods import METHODS
from pretrain.models import vit
from pretrain.numerics import apply_numerics, choose_numerics

BATCH = 8
ARCH = vit.Arch(128, 2, 2)  # heads of 64 channels, as in the larger architectures
DECODER = {"decoder_embed_dim": 64, "decoder_depth": 1, "decoder_num_heads": 2}
SINCOS, RELATIVE = {"position": "sincos"}, {"position": "relative"}
LEARNED = {"position": "learned", "registers": 2}
LOMAR = {"name": "lomar", "num_windows": 2}
SIMMIM = {"name": "simmim", "mask_patch_size": 16}
TOKENS = {"name": "tokens", "tokenizer": "random_projection", "vocab_size": 32}
HOG = {"name": "hog", "cell_sizes": [4, 32]}
ADD_ONS: dict[str, dict[str, Any]] = {
    "pr_mim": {"throw_ratio": 0.3, "kernel_size": 3},
    "lut": {"alpha": 1.0, "hidden_dim": 64},
}

# Each variant runs alone and with every combination of the add-ons that its method supports.
VARIANTS: dict[str, dict[str, Any]] = {
    "lomar": {"method": LOMAR, "model": RELATIVE},
    "lomar-late": {"method": LOMAR | {"mask_token_block": 1}, "model": RELATIVE},
    "mae": {"method": {"name": "mae", **DECODER}, "model": SINCOS},
    "simmim": {"method": SIMMIM, "model": RELATIVE},
    "beit": {"method": {"name": "beit"}, "model": RELATIVE, "target": TOKENS},
    "lc_mae": {"method": {"name": "lc_mae", "proj_dim": 32, **DECODER}, "model": SINCOS},
    "ae": {"method": {"name": "ae", "block_size": 24, **DECODER}, "model": SINCOS},
    "lomar-window_5": {"method": LOMAR | {"window_size": 5}, "model": RELATIVE | {"registers": 4}},
    "lomar-asymmetric": {"method": LOMAR | {"architecture": "asymmetric", **DECODER}, "model": RELATIVE},
    "lomar-beit": {"method": LOMAR | {"mask_type": "block"}, "model": SINCOS, "target": TOKENS},
    "mae-mask_tokens": {"method": {"name": "mae", "encoder_mask_tokens": True, **DECODER}, "model": LEARNED},
    "simmim-bias": {"method": SIMMIM, "model": {"position": "bias", "layer_scale": 0.1}},
    "mae-cross": {
        "method": {"name": "mae", "decoder": "cross", "inter_block_attention": True, **DECODER},
        "model": SINCOS,
    },
    "lomar-cross": {"method": LOMAR | {"architecture": "asymmetric", "decoder": "cross", **DECODER}, "model": RELATIVE},
    "mff": {"method": {"name": "mff", "blocks": [1, 2], **DECODER}, "model": SINCOS},
    "local_mim": {"method": {"name": "local_mim", "blocks": [1, 2], **DECODER}, "model": SINCOS, "target": HOG},
    "lomar-multiscale": {
        "method": LOMAR | {"architecture": "multiscale", "blocks": [1, 2], **DECODER},
        "model": RELATIVE,
        "target": HOG | {"cell_sizes": [4, 16]},
    },
    "mae-num_masks-ema": {
        "method": {"name": "mae", "num_masks": 2, **DECODER},
        "model": SINCOS,
        "target": {"name": "ema", "blocks": 2},
    },
    # Queries for all 80 patches: a selection of those with the largest attention could depend on rounding.
    "tec": {"method": {"name": "tec", "num_queries": 80, **DECODER}, "model": SINCOS, "target": {"name": "teacher"}},
}


def cases() -> dict[str, dict[str, Any]]:
    """Return the config sections of each case, by name."""
    found = {}
    for name, sections in VARIANTS.items():
        add_ons = sorted(METHODS[sections["method"]["name"]].add_ons)
        for count in range(len(add_ons) + 1):
            for some in itertools.combinations(add_ons, count):
                if "lut" in some and {sections["method"].get("mask_type"), name} & {"block", "mae-num_masks-ema"}:
                    continue  # rejected: LUT needs pairs of disjoint masks, and has a moving average of its own
                found["-".join([name, *some])] = sections | {add_on: ADD_ONS[add_on] for add_on in some}
    return found


def configure(sections: dict[str, Any], precision: str = "bf16", **model: str) -> PretrainConfig:
    """Build a config for 8x10 patches; `model` adds keys to the model section."""
    keys = {
        "name": "step",
        "data": {"shards": "unused", "image_size": [128, 160]},
        "train": {"global_batch_size": BATCH, "epochs": 100, "precision": precision},
        **sections,
        "model": {"arch": "vit_tiny", **sections["model"], **model},
    }
    with patch.dict(vit.ARCHS, vit_tiny=ARCH):  # block numbers in keys are checked against the architecture
        return PretrainConfig.model_validate(keys)


class Step(NamedTuple):
    """Results of one step, in fp32 on the CPU."""

    loss: Tensor
    gradients: dict[str, Tensor]


def build(config: PretrainConfig, device: torch.device) -> nn.Module:
    """Build the method with the numerics of its config and randomized parameters."""
    with patch.dict(vit.ARCHS, vit_tiny=ARCH):
        method = build_method(config, untrained_teacher(config))
        numerics = choose_numerics(config, device, stage=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    for module in filter(None, (method, feature_teacher(method))):
        apply_numerics(module, numerics)
    return method.to(device).train()


def inputs(
    method: Any, config: PretrainConfig, device: torch.device, step: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw the same images and masks on every device. LUT's batch norms would amplify rounding if images were alike."""
    rng, sampler = np.random.default_rng(step), method.mask_sampler()
    height, width = (side // 32 for side in config.data.height_width)
    coarse = rng.integers(0, 256, (BATCH, len(config.augmentations), height, 1, width, 1, 3))
    fine = rng.integers(-20, 20, (*coarse.shape[:3], 32, width, 32, 3))
    pixels = (coarse + fine).clip(0, 255).astype(np.uint8)
    images = torch.from_numpy(pixels).flatten(2, 3).flatten(3, 4).squeeze(1)
    drawn = [sampler(rng) for _ in range(BATCH)]
    mask_indices = {name: torch.from_numpy(np.stack([one[name] for one in drawn])) for name in drawn[0]}
    return images.to(device), {name: index.to(device) for name, index in mask_indices.items()}


def run_step(method: Any, config: PretrainConfig, device: torch.device, bf16: bool, step: int = 0) -> Step:
    """Run forward and backward, under autocast or in fp32."""
    images, mask_indices = inputs(method, config, device, step)
    method.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        features = {}
        if config.lut:
            with torch.no_grad():
                features["teacher_features"] = method.teacher_model().to(device)(images)
        loss = method(images, mask_indices, **features)["loss"]
    loss.backward()
    gradients = {name: p.grad.float().cpu() for name, p in method.named_parameters() if p.grad is not None}
    return Step(loss.detach().float().cpu(), gradients)
