"""Small published models in their original modules, and checkpoint files with their authors' key names.

The modules are timm's (VisionTransformer for MAE, LUT, DINO and DINOv2, Beit for BEiT and SimMIM). LoMaR's is a slow
one, written from the paper and iRPE's rule.
"""

import argparse
import math
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from downstream.checkpoints.compare import float64_copy, max_difference
from pretrain.models.features import features
from pretrain.models.vit import Arch, ViT, sincos_positions

# Bounds of `feature_difference`. With the same parameters, features differ only by float64 rounding. Folded or resized
# parameters are rounded to fp32 once more, by a relative 6e-8, and several such errors add up in a feature.
SAME_PARAMETERS, SAME_TO_FP32 = 1e-12, 1e-6

TINY = Arch(dim=16, depth=2, heads=2)
PATCH, GRID = 4, 3
SHAPE = {"img_size": PATCH * GRID, "patch_size": PATCH, "embed_dim": 16, "depth": 2, "num_heads": 2}


class Original(NamedTuple):
    """A file, and the module whose features an encoder loaded from it must reproduce."""

    path: Path
    model: Any


def randomized(model: Any, seed: int = 1) -> Any:
    """Add noise to all parameters, since biases, gammas and tables start at the special values zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def vit(seed: int = 1, kind: type[VisionTransformer] = VisionTransformer, **options: Any) -> Any:
    return randomized(kind(**{**SHAPE, "num_classes": 0, **options}), seed)


class HalfPixels:
    """Converts pixels normalized with ImageNet's statistics to mean and std 0.5, with which the model was trained."""

    def forward_features(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return super().forward_features(half_pixels(x), *arguments, **options)  # type: ignore[misc]


class HalfBeit(HalfPixels, Beit):
    """BEiT, trained with mean and std 0.5."""


class HalfViT(HalfPixels, VisionTransformer):
    """Google's ViT, trained with mean and std 0.5."""


class NoClassToken(VisionTransformer):
    """I-JEPA's encoder. Like our features, it puts the mean of the tokens in front of them."""

    def forward_features(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        tokens = super().forward_features(x, *arguments, **options)
        return torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)


def half_pixels(images: Tensor) -> Tensor:
    """Convert (B, 3, H, W) pixels from ImageNet's normalization to mean and std 0.5."""
    statistics = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=images.dtype)
    mean, std = statistics[:, :, None, None]
    return (images * std + mean - 0.5) / 0.5


def beit(seed: int = 1, kind: type[Beit] = Beit, **options: Any) -> Any:
    options = {"qkv_bias": True, "use_abs_pos_emb": False, "global_pool": "token", "num_classes": 0, **options}
    return randomized(kind(**{**SHAPE, **options}), seed)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


def images(size: int | tuple[int, int] = PATCH * GRID) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return noise(2, 3, height, width)


def feature_difference(encoder: ViT, model: Any, pixels: Tensor) -> float:
    """Return `max_difference` in float64 between an encoder and a model's `forward_features` on (B, 3, H, W) pixels."""
    pixels = pixels.double()
    with torch.no_grad():
        expected = float64_copy(model).forward_features(pixels)
        return max_difference(features(float64_copy(encoder), pixels), expected)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def _mae_model(seed: int = 1) -> Any:
    model = vit(seed)
    model.pos_embed.data[:] = torch.cat([torch.zeros(1, 16), sincos_positions(16, GRID, GRID)])
    return model


_DECODER = {
    "mask_token": noise(1, 1, 8),
    "decoder_pos_embed": noise(1, 10, 8),
    "decoder_embed.weight": noise(8, 16),
    "decoder_blocks.0.attn.qkv.weight": noise(24, 8),
    "decoder_norm.bias": noise(8),
    "decoder_pred.weight": noise(48, 8),
}


def mae(folder: Path) -> Original:
    model = _mae_model()
    arguments = argparse.Namespace(model="mae_vit_base_patch16", mask_ratio=0.75)
    torch.save({"model": {**model.state_dict(), **_DECODER}, "args": arguments, "epoch": 799}, folder / "mae.pth")
    return Original(folder / "mae.pth", model)


def crossmae(folder: Path) -> Original:
    """With inter-block attention, CrossMAE trains no last norm, so ours has unit weights and zero biases."""
    model = _mae_model()
    torch.nn.init.ones_(model.norm.weight)
    torch.nn.init.zeros_(model.norm.bias)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("norm.")}
    sums = {"wfm.linear.weight": noise(2, 3), "dec_norms.0.weight": noise(16), "dec_norms.0.bias": noise(16)}
    torch.save({"model": {**state, **_DECODER, **sums}, "epoch": 799}, folder / "crossmae.pth")
    return Original(folder / "crossmae.pth", model)


def lut(folder: Path, weights: str = "online") -> Original:
    online, averaged = _mae_model(), _mae_model(seed=2)
    heads = {
        "head.0.weight": noise(32, 16),
        "head.1.running_mean": noise(32),
        "head.1.num_batches_tracked": torch.tensor(3),
        "predictor.3.weight": noise(16, 32),
    }
    sets = {
        name: {**model.state_dict(), **_DECODER, **heads}
        for name, model in (("model", online), ("model_ema", averaged))
    }
    torch.save({**sets, "args": argparse.Namespace(w_b=0.25)}, folder / "lut.pth")
    return Original(folder / "lut.pth", online if weights == "online" else averaged)


def simmim(folder: Path) -> Original:
    """Contains a yacs config, although that package need not be installed where the file is loaded."""
    model = beit(init_values=0.1, use_shared_rel_pos_bias=True)
    state = prefixed("encoder.", {**model.state_dict(), "mask_token": noise(1, 1, 16)})
    state["encoder.rel_pos_bias.relative_position_index"] = torch.zeros(10, 10, dtype=torch.int64)
    config = types.ModuleType("yacs.config")
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    config.CfgNode = node  # type: ignore[attr-defined]
    settings = node(AMP_OPT_LEVEL="O1")
    settings.__dict__["__immutable__"] = True
    with patch.dict(sys.modules, {"yacs": types.ModuleType("yacs"), "yacs.config": config}):
        torch.save(
            {"model": {**state, "decoder.0.weight": noise(48, 16, 1, 1)}, "config": settings, "max_accuracy": 0.0},
            folder / "simmim.pth",
        )
    return Original(folder / "simmim.pth", model)


def beit_pretrained(folder: Path) -> Original:
    model = beit(kind=HalfBeit, init_values=0.1, use_shared_rel_pos_bias=True)
    state = {**model.state_dict(), "mask_token": noise(1, 1, 16), "lm_head.weight": noise(32, 16)}
    torch.save({"model": state}, folder / "beit.pth")
    return Original(folder / "beit.pth", model)


def beit_finetuned(folder: Path) -> Original:
    model = beit(kind=HalfBeit, init_values=0.1, use_rel_pos_bias=True, num_classes=5)
    index = {f"blocks.{i}.attn.relative_position_index": torch.zeros(10, 10) for i in range(2)}
    torch.save({"module": {**model.state_dict(), **index}}, folder / "beit_ft.pth")
    return Original(folder / "beit_ft.pth", model)


def dino(folder: Path, weights: str | None = None) -> Original:
    student, teacher = vit(seed=1), vit(seed=2)
    head = {"head.mlp.0.weight": noise(32, 16), "head.last_layer.weight_g": noise(8, 1)}
    stored = {
        "student": prefixed("module.", {**prefixed("backbone.", student.state_dict()), **head}),
        "teacher": {**prefixed("backbone.", teacher.state_dict()), **head},
        "optimizer": {"param_groups": [{"lr": np.float64(1e-3), "rows": [np.int64(3), np.float32(2)]}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small"),
    }
    torch.save(stored, folder / "dino.pth")
    return Original(folder / "dino.pth", student if weights == "online" else teacher)


def dino_backbone(folder: Path) -> Original:
    model = vit()
    torch.save(model.state_dict(), folder / "dino_backbone.pth")
    return Original(folder / "dino_backbone.pth", model)


def dinov2(folder: Path) -> Original:
    model = vit(init_values=1e-5)
    torch.save({**model.state_dict(), "mask_token": noise(1, 16)}, folder / "dinov2.pth")
    return Original(folder / "dinov2.pth", model)


def dinov2_registers(folder: Path) -> Original:
    """Its position table has a row for the class token and none for the registers."""
    model = vit(init_values=1e-5, reg_tokens=2, no_embed_class=True)
    state, row = dict(model.state_dict()), noise(1, 1, 16)
    state |= {"cls_token": state["cls_token"] - row, "pos_embed": torch.cat([row, state["pos_embed"]], dim=1)}
    state["register_tokens"] = state.pop("reg_token")
    torch.save({**state, "mask_token": noise(1, 16)}, folder / "dinov2_reg.pth")
    return Original(folder / "dinov2_reg.pth", model)


def timm_registers(folder: Path) -> Original:
    """Its position table has rows for the registers, too."""
    model = vit(reg_tokens=2)
    torch.save(model.state_dict(), folder / "timm_reg.pth")
    return Original(folder / "timm_reg.pth", model)


def dinov2_training(folder: Path) -> Original:
    """Its blocks are in chunks, but numbered consecutively."""
    model = vit(init_values=1e-5)
    state = {name.replace("blocks.", "blocks.0.", 1): tensor for name, tensor in model.state_dict().items()}
    state = prefixed("backbone.", {**state, "mask_token": noise(1, 16)})
    torch.save({"teacher": {**state, "dino_head.mlp.0.weight": noise(4, 16)}}, folder / "dinov2_training.pth")
    return Original(folder / "dinov2_training.pth", model)


def timm_classifier(folder: Path) -> Original:
    model = vit(num_classes=7)
    torch.save({"state_dict": prefixed("module.", model.state_dict()), "arch": "vit"}, folder / "timm.pth.tar")
    return Original(folder / "timm.pth.tar", model)


def deit3(folder: Path) -> Original:
    """Its position table has no row for the class token."""
    model = vit(init_values=1e-5, no_embed_class=True)
    torch.save({"model": model.state_dict()}, folder / "deit3.pth")
    return Original(folder / "deit3.pth", model)


class _LoMaRAttention(nn.Module):
    """Contextual product iRPE on keys, entry by entry."""

    def __init__(self, grid: int):
        super().__init__()
        self.grid = grid
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.rpe_k = nn.Module()
        self.rpe_k.lookup_table_weight = nn.Parameter(torch.zeros(1, 8, 50))

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        count = x.shape[1]
        q, k, v = self.qkv(x).reshape(len(x), count, 3, 2, 8).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(2, 3) / math.sqrt(8)
        bias = torch.zeros_like(logits)
        for i in range(count):
            for j in range(count):
                bias[:, :, i, j] = q[:, :, i] @ self.rpe_k.lookup_table_weight[0, :, self.bucket(i, j)]
        return self.proj(((logits + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))

    def bucket(self, i: int, j: int) -> int:
        if i == 0 or j == 0:
            return 49
        rows, cols = ((i - 1) // self.grid - (j - 1) // self.grid, (i - 1) % self.grid - (j - 1) % self.grid)
        return (_piecewise(rows) + 3) * 7 + _piecewise(cols) + 3


def _piecewise(offset: int) -> int:
    """iRPE's formula (18) with alpha 1.9, beta 3.8, gamma 15.2."""
    if abs(offset) <= 1.9:
        return offset
    far = 1.9 + math.log(abs(offset) / 1.9) / math.log(15.2 / 1.9) * 1.9
    return int(math.copysign(min(round(far), 3.8), offset))


def lomar_model(grid: int = GRID) -> Any:
    model = VisionTransformer(**{**SHAPE, "img_size": PATCH * grid, "num_classes": 0, "pos_embed": "none"})
    for block in model.blocks:
        block.attn = _LoMaRAttention(grid)
    return randomized(model)


def lomar(folder: Path, grid: int = GRID) -> Original:
    model = lomar_model(grid)
    state = {
        **model.state_dict(),
        "pos_embed": noise(1, 1 + grid**2, 16),
        "mask_token": noise(1, 1, 16),
        "encoder_pred.weight": noise(48, 16),
    }
    torch.save({"model": state, "args": argparse.Namespace(window_size=7)}, folder / "lomar.pth")
    return Original(folder / "lomar.pth", model)


ORIGINALS: dict[str, Callable[[Path], Original]] = {
    "mae": mae,
    "crossmae": crossmae,
    "lut": lut,
    "simmim": simmim,
    "beit_pretrained": beit_pretrained,
    "beit_finetuned": beit_finetuned,
    "dino": dino,
    "dino_backbone": dino_backbone,
    "dinov2": dinov2,
    "dinov2_training": dinov2_training,
    "dinov2_registers": dinov2_registers,
    "timm_registers": timm_registers,
    "timm_classifier": timm_classifier,
    "deit3": deit3,
    "lomar": lomar,
}


class Bomb:
    """When its pickle is loaded, it calls `open` and creates a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.target), "w"))


def old_pickle(value: Any, path: Path) -> None:
    """Save in the format of torch before 1.6, or with plain pickle."""
    if isinstance(value, dict):
        torch.save(value, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(value, protocol=2))
