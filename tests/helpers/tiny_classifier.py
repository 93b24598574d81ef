"""A tiny classifier of five classes, its encoder, and a batch."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from downstream.classify.config import FinetuneConfig, load
from helpers.originals import TINY, randomized
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.vit import ViT

SIZE = (8, 12)
DEPTH = TINY.depth


def configure(tmp_path: Path, **sections: Any) -> FinetuneConfig:
    """Configure a tiny classifier of five classes from scratch; `sections` are overrides, with `__` for the dot."""
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in sections.items()]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: tiny\nmodel: {arch: vit_tiny, patch_size: 4}\ndata: {shards: a, image_size: [8, 12]}\nval: {shards: b}\n"
        "head: {num_classes: 5}\noptim: {warmup_epochs: 0}\ntrain: {epochs: 1, global_batch_size: 8, precision: fp32}\n"
    )
    return load(str(recipe), overrides)


POSITIONS = ["relative", "sincos", "bias"]


def small_encoder(position: str, registers: int = 0) -> ViT:
    return ViT("vit_tiny", 4, (2, 3), position == "relative", bias=position == "bias", registers=registers)


def encoder_file(folder: Path, position: str = "relative", registers: int = 0) -> Path:
    torch.manual_seed(3)
    encoder = small_encoder(position, registers)
    randomized(encoder)
    state = encoder.state_dict()
    save_file(state, folder / "encoder.safetensors", EncoderSpec.of(encoder).to_metadata())
    return folder / "encoder.safetensors"


def batch(count: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (B, H, W, 3) uint8 images and (B,) labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, *SIZE, 3), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 5, (count,), generator=generator)


def standardized(images: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W), normalized with ImageNet's statistics."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((images / 255 - mean) / std).permute(0, 3, 1, 2)
