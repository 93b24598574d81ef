"""The authors' LoMaR and MAE from a user's checkouts, timed beside ours; this project contains none of their code.

They were written for timm 0.3.2 and older numpy. Only what no longer exists is replaced: the unused `qk_scale` of
timm's `Block`, `numpy.float`, and `easydict` if it is not installed. MAE uses today's timm `Block`, with fused
attention; LoMaR has its own. iRPE's CUDA operator (`rpe_ops`) is used if it can be imported; otherwise iRPE falls back
to PyTorch and reports it.
"""

import functools
import importlib
import importlib.util
import sys
import types
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.variants import WINDOWS, Trainee, image_side, patch_size
from pretrain.models.vit import ARCHS

REPOSITORIES = {"lomar": "github.com/junchen14/LoMaR", "mae": "github.com/facebookresearch/mae"}
_MODULES = {"lomar": "models_lomar", "mae": "models_mae"}


def authors_trainee(kind: str, checkout: Path, arch: str, size: int, images: int, device: torch.device) -> Trainee:
    """The authors' `lomar` or `mae` with torch's AdamW, on a batch of normalized floats.

    Raises:
        ValueError: the checkout does not have the module.
    """
    model = _build(kind, checkout, arch, size).to(device)
    side = image_side(arch, size)
    batch = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(1)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.05, betas=(0.9, 0.95))
    keys = {"num_window": WINDOWS[size]} if kind == "lomar" else {}

    def loss() -> Tensor:
        return model(batch, **keys)[0]

    return Trainee(model, loss, optimizer, images, device)


def _build(kind: str, checkout: Path, arch: str, size: int) -> nn.Module:
    module = _import(checkout.resolve(), _MODULES[kind], REPOSITORIES[kind])
    if kind == "mae":
        module.Block = functools.partial(_block, module.Block)  # type: ignore[attr-defined]
    shape = ARCHS[arch]
    with patch.object(np, "float", float, create=True):
        return module.MaskedAutoencoderViT(
            img_size=image_side(arch, size),
            patch_size=patch_size(arch),
            embed_dim=shape.dim,
            depth=shape.depth,
            num_heads=shape.heads,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
            norm_pix_loss=True,
        )


def _block(block: type[nn.Module], *args: Any, qk_scale: None = None, **keys: Any) -> nn.Module:
    return block(*args, **keys)


def _import(checkout: Path, name: str, repository: str) -> types.ModuleType:
    """Imports a module from a checkout; later imports do not see the checkout."""
    if not (checkout / f"{name}.py").is_file():
        raise ValueError(f"{checkout} has no {name}.py: give a checkout of {repository}")
    before = set(sys.modules)
    sys.path.append(str(checkout))  # last, because LoMaR's checkout has a `profile.py`
    try:
        if importlib.util.find_spec("easydict") is None:
            sys.modules["easydict"] = types.ModuleType("easydict")
            sys.modules["easydict"].EasyDict = types.SimpleNamespace  # type: ignore[attr-defined]
        with warnings.catch_warnings():  # hide today's timm's; iRPE's warning about a missing CUDA operator is kept
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", message="Overwriting .* in registry")
            return importlib.import_module(name)
    finally:
        sys.path.remove(str(checkout))
        for added in sys.modules.keys() - before:  # because both checkouts have a package `util`
            if added == "easydict" or str(checkout) in _places(sys.modules[added]):
                del sys.modules[added]


def _places(module: types.ModuleType) -> str:
    return " ".join(map(str, (getattr(module, "__file__", ""), *getattr(module, "__path__", ()))))
