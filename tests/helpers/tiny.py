"""Small methods and batches for the tests of pretraining."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from pretrain.methods import METHODS
from pretrain.methods.base import Method
from pretrain.methods.lomar import LoMaR
from pretrain.methods.pr_mim import PRMIMConfig
from pretrain.methods.targets import AnyTargetConfig, TargetConfig, build_target
from pretrain.methods.targets.features import EMAConfig, EncoderTeacher, TeacherConfig
from pretrain.models import patches, vit
from pretrain.trainer.config import ModelConfig
from pretrain.trainer.optim import parameter_groups

TINY = vit.Arch(dim=16, depth=2, heads=2)


def tiny_vit(
    patch_size: int,
    grid: tuple[int, int],
    relative: bool = True,
    grad_checkpointing: bool = False,
    arch: vit.Arch = TINY,
    **options: Any,
) -> vit.ViT:
    with patch.dict(vit.ARCHS, vit_tiny=arch):
        return vit.ViT("vit_tiny", patch_size, grid, relative, grad_checkpointing, **options)


def tiny_target(method: type[Method], keys: dict[str, Any]) -> TargetConfig:
    """Return a `target` section whose keys are completed as in a recipe."""
    default = method.default_target
    if keys.get("name", default.name) == default.name:
        keys = {"name": default.name, **default.model_dump(exclude_unset=True), **keys}
    return TypeAdapter(AnyTargetConfig).validate_python(keys)


def tiny_method(
    keys: dict[str, Any],
    grid: tuple[int, int],
    patch_size: int,
    relative: bool = True,
    pr_mim: PRMIMConfig | None = None,
    **encoder: Any,
) -> Any:
    """Build a freshly initialized method; `keys` are those of its section and, under `target`, of its target."""
    torch.manual_seed(0)
    kind = METHODS[keys["name"]]
    config = kind.Config(**{name: value for name, value in keys.items() if name != "target"})
    target = tiny_target(kind, keys.get("target", {}))
    with patch.dict(vit.ARCHS, vit_tiny=encoder.get("arch", TINY)):
        position = "relative" if relative else "sincos"
        config.check(grid, ModelConfig(arch="vit_tiny", patch_size=patch_size, position=position))
    config.check_target(target, patch_size)
    assert target.name in kind.targets
    student, teacher = tiny_vit(patch_size, grid, relative, **encoder), None
    if isinstance(target, TeacherConfig | EMAConfig):
        teacher = EncoderTeacher(tiny_vit(patch_size, grid, relative, **encoder))
    return kind(config, student, build_target(target, grid, patch_size, teacher), pr_mim)


def tiny_lomar(
    grid: tuple[int, int] = (4, 6),
    patch_size: int = 2,
    relative: bool = True,
    grad_checkpointing: bool = False,
    arch: vit.Arch = TINY,
    pr_mim: PRMIMConfig | None = None,
    registers: int = 0,
    **keys: Any,
) -> LoMaR:
    """Build a freshly initialized LoMaR: three windows of 3x3 patches, five of them masked, unless `keys` change it."""
    keys = {"name": "lomar", "num_windows": 3, "window_size": 3, "mask_ratio": 0.6} | keys
    encoder = {"grad_checkpointing": grad_checkpointing, "arch": arch, "registers": registers}
    return tiny_method(keys, grid, patch_size, relative, pr_mim, **encoder)


def randomize(model: nn.Module) -> None:
    """Add noise to all parameters, since biases and relative tables start at zero and norms at one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)


def random_images(model: Any, count: int = 2) -> Tensor:
    height, width = (side * model.encoder.patch_size for side in model.encoder.grid)
    return torch.randint(0, 256, (count, height, width, 3), generator=torch.Generator().manual_seed(2)).byte()


def random_mask_indices(model: Any, count: int = 2, seed: int = 3) -> dict[str, Tensor]:
    sampler = model.mask_sampler()
    samples = [sampler(np.random.default_rng((seed, i))) for i in range(count)]
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}


@contextmanager
def everything_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make `pretrain` compute in float64, so that comparisons can be far stricter than fp32 allows."""
    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "float", Tensor.double)
        patches._pixel_statistics.cache_clear()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)
            patches._pixel_statistics.cache_clear()


def loss_and_gradients(
    model: nn.Module, images: Tensor, mask_indices: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(images, mask_indices)["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equals_reference(
    build: Callable[[], Any],
    naive_loss: Callable[[Any, Tensor, dict[str, Tensor], dict[str, Tensor]], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Check that loss and all gradients match a naive loop: strictly in float64, closely in fp32.

    Args:
        build: builds the model.
        naive_loss: (model, images, mask_indices, weights) -> the loss, from float64 weights.
    """
    model = build()
    randomize(model)
    images, mask_indices = random_images(model), random_mask_indices(model)
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    expected = naive_loss(model, images, mask_indices, weights)
    expected.backward()
    single, single_gradients = loss_and_gradients(model, images, mask_indices)
    with everything_float64(monkeypatch):
        exact_model = build()
        # Buffers are left out: the float64 model computes its own positions.
        exact_model.load_state_dict(dict(model.named_parameters()), strict=False)
        exact, exact_gradients = loss_and_gradients(exact_model, images, mask_indices)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, expected.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(single.double(), expected.detach(), rtol=1e-5, atol=0)
    assert weights.keys() == exact_gradients.keys() == single_gradients.keys(), "every parameter has a gradient"
    for name, weight in weights.items():
        largest = weight.grad.abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(exact_gradients[name], weight.grad, rtol=0, atol=1e-10 * largest, msg=name)
        torch.testing.assert_close(single_gradients[name].double(), weight.grad, rtol=0, atol=1e-4 * largest, msg=name)


def train(
    model: nn.Module, images: Tensor, mask_indices: dict[str, Tensor] | None, steps: int = 200, lr: float = 3e-3
) -> list[float]:
    """Train on one batch and return the loss of every step; without `mask_indices`, every step draws new masks."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=lr, fused=True)
    losses = []
    for step in range(steps):
        drawn = random_mask_indices(model, len(images), 1000 + step) if mask_indices is None else mask_indices
        loss, _ = loss_and_gradients(model, images, drawn)
        optimizer.step()
        losses.append(loss.item())
    return losses
