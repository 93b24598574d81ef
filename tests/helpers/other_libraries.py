"""Small files of transformers, mmpretrain, I-JEPA and MoCo v3, and modules whose features they must reproduce.

For transformers, they are its own modules. mmpretrain conflicts with this project's dependencies, so its files are made
from timm's modules, with mmpretrain's names taken from its code.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from helpers import originals
from helpers.originals import GRID, PATCH, Original, noise, prefixed, randomized

_SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": PATCH * GRID,
    "patch_size": PATCH,
    "layer_norm_eps": 1e-6,
}
_DECODER = {
    "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}


class Transformers(nn.Module):
    """A transformers model with timm's methods; without a class token, the mean of the tokens comes first.

    Args:
        model: the base model.
        half: whether its pixels are normalized with mean and std 0.5.
        norm: the last norm, if the base model lacks it.
        whole: a classifier, pixels -> logits.
    """

    def __init__(self, model: nn.Module, half: bool, norm: nn.Module, whole: nn.Module):
        super().__init__()
        self.model, self.half, self.norm, self.whole = model, half, norm, whole

    def forward_features(self, images: Tensor) -> Tensor:
        options = {}
        if type(self.model).__name__ == "ViTMAEModel":  # keep all patches, in order
            options["noise"] = torch.arange(GRID**2, dtype=images.dtype).expand(len(images), -1)
        tokens = self.norm(self.model(self._pixels(images), **options).last_hidden_state)
        without_class_token = tokens.shape[1] == GRID**2
        return torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) if without_class_token else tokens

    def forward(self, images: Tensor) -> Tensor:
        return self.whole(self._pixels(images)).logits

    def _pixels(self, images: Tensor) -> Tensor:
        return originals.half_pixels(images) if self.half else images


def transformers_model(folder: Path, name: str, **options: Any) -> Original:
    """Save a hub folder with a model of class `name` and, for mean and std 0.5, a preprocessor config."""
    import transformers

    kind = re.sub(r"(Model|For.*)$", "", name)
    more = {"mask_ratio": 0.0, **_DECODER} if kind == "ViTMAE" else {}
    config = getattr(transformers, f"{kind}Config")(**{**_SHAPE, **more, **options})
    half = kind in ("Beit", "Data2VecVision", "ViT")
    model = randomized(getattr(transformers, name)(config))
    base = getattr(model, model.base_model_prefix, model)
    out = folder / name
    model.save_pretrained(out)
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if half else {}
    if statistics:
        transformers.ViTImageProcessor(**statistics).save_pretrained(out)
    norm = model.layernorm if name == "BeitForMaskedImageModeling" else nn.Identity()  # outside of the base model
    return Original(out, Transformers(base, half, norm, model if "Classification" in name else nn.Identity()))


def _to_mmpretrain(name: str) -> str:
    for pattern, theirs in (
        (r"patch_embed\.proj", "patch_embed.projection"),
        (r"blocks\.(\d+)\.norm([12])", r"layers.\1.ln\2"),
        (r"blocks\.(\d+)\.mlp\.fc1", r"layers.\1.ffn.layers.0.0"),
        (r"blocks\.(\d+)\.mlp\.fc2", r"layers.\1.ffn.layers.1"),
        (r"blocks\.(\d+)\.ls1\.gamma", r"layers.\1.attn.gamma1.weight"),
        (r"blocks\.(\d+)\.ls2\.gamma", r"layers.\1.ffn.gamma2.weight"),
        (r"blocks\.", "layers."),
        (r"^norm\.", "ln1."),
        (r"^fc_norm\.", "ln2."),
    ):
        name = re.sub(pattern, theirs, name)
    return name


def mmpretrain_state(state: dict[str, Tensor], head: str = "head.fc.") -> dict[str, Tensor]:
    """Rename timm's keys to mmpretrain's."""
    backbone = {_to_mmpretrain(name): tensor for name, tensor in state.items() if not name.startswith("head.")}
    heads = {name.replace("head.", head, 1): tensor for name, tensor in state.items() if name.startswith("head.")}
    return {**prefixed("backbone.", backbone), **heads}


def mmpretrain_mae(folder: Path) -> Original:
    path, model = originals.mae(folder)
    extra = {"backbone.mask_token": noise(1, 1, 16), "neck.decoder_embed.weight": noise(8, 16), "head.x": noise(1)}
    torch.save({"meta": {"epoch": 800}, "state_dict": {**mmpretrain_state(model.state_dict()), **extra}}, path)
    return Original(path, model)


def mmpretrain_vit(folder: Path) -> Original:
    """A classifier with LayerScale; the config in its file defines the pixel normalization."""
    model = originals.vit(kind=originals.HalfViT, init_values=1e-5, num_classes=5)
    config = (
        "model = dict(type='ImageClassifier')\n"
        "data_preprocessor = dict(\n    mean=[127.5, 127.5, 127.5],\n    std=[127.5, 127.5, 127.5],\n    to_rgb=True)\n"
    )
    state = mmpretrain_state(model.state_dict(), "head.layers.head.")
    torch.save({"meta": {"cfg": config}, "state_dict": state}, folder / "mm_vit.pth")
    return Original(folder / "mm_vit.pth", model)


def mmpretrain_beit(folder: Path) -> Original:
    path, model = originals.beit_finetuned(folder)
    torch.save({"state_dict": mmpretrain_state(model.state_dict(), "head.layers.head.")}, path)
    return Original(path, model)


def ijepa(folder: Path, weights: str | None = None) -> Original:
    """Two encoders without class tokens."""
    options = {"kind": originals.NoClassToken, "class_token": False, "global_pool": "avg", "fc_norm": False}
    encoder, target = (originals.vit(seed, **options) for seed in (1, 2))
    stored = {
        "encoder": prefixed("module.", encoder.state_dict()),
        "predictor": {"module.predictor_embed.weight": noise(8, 16)},
        "target_encoder": prefixed("module.", target.state_dict()),
        "opt": {"state": {}, "param_groups": []},
        "scaler": None,
        "epoch": 300,
    }
    torch.save(stored, folder / "ijepa.pth.tar")
    return Original(folder / "ijepa.pth.tar", encoder if weights in ("online", "encoder") else target)


def moco_v3(folder: Path, weights: str | None = None) -> Original:
    base, momentum = originals.vit(seed=1), originals.vit(seed=2)
    head = {"head.0.weight": noise(32, 16), "head.1.running_mean": noise(32)}
    state = {
        **prefixed("module.base_encoder.", {**base.state_dict(), **head}),
        **prefixed("module.momentum_encoder.", {**momentum.state_dict(), **head}),
        "module.predictor.0.weight": noise(16, 32),
    }
    torch.save({"epoch": 300, "arch": "vit_base", "state_dict": state, "scaler": {}}, folder / "moco.pth.tar")
    return Original(folder / "moco.pth.tar", momentum if weights in ("ema", "momentum_encoder") else base)


TRANSFORMERS: dict[str, dict[str, Any]] = {
    "ViTMAEForPreTraining": {},
    "ViTMAEModel": {},
    "ViTModel": {},
    "ViTForImageClassification": {"num_labels": 5},
    "ViTForMaskedImageModeling": {"encoder_stride": PATCH},
    "BeitForMaskedImageModeling": {"use_shared_relative_position_bias": True, "use_mask_token": True, "vocab_size": 8},
    "BeitModel": {"use_relative_position_bias": True, "use_mean_pooling": False},
    "Data2VecVisionModel": {"use_relative_position_bias": True, "use_mean_pooling": False},
    "Dinov2Model": {},
    "Dinov2WithRegistersModel": {"num_register_tokens": 2},
    "IJepaModel": {},
}
OTHERS: dict[str, Callable[[Path], Original]] = {
    "mmpretrain_mae": mmpretrain_mae,
    "mmpretrain_vit": mmpretrain_vit,
    "mmpretrain_beit": mmpretrain_beit,
    "ijepa": ijepa,
    "moco_v3": moco_v3,
}
