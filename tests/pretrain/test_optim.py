"""The schedule and the optimizer."""

import math

import pytest
import torch
from torch import nn

from pretrain.trainer.config import OptimConfig
from pretrain.trainer.optim import GuardedAdamW, learning_rate, parameter_groups, set_learning_rate

PER_EPOCH, EPOCHS, PEAK = 10, 100, 2.4e-3


def rate(step: int, **optim: float) -> float:
    return learning_rate(step, PER_EPOCH, EPOCHS, PEAK, OptimConfig(**({"warmup_epochs": 20} | optim)))


def test_warm_up_is_a_line_from_zero_to_the_peak():
    assert rate(0) == 0
    for step in range(201):
        assert rate(step) == pytest.approx(PEAK * step / 200, rel=1e-12)


@pytest.mark.parametrize("min_lr", [0.0, 1e-5])
def test_then_half_a_cosine_to_the_end(min_lr: float):
    for step in (200, 201, 333, 400, 600, 777, 999, 1000):
        angle = math.pi * (step - 200) / 800
        expected = min_lr + (PEAK - min_lr) * (1 + math.cos(angle)) / 2
        assert rate(step, min_lr=min_lr) == pytest.approx(expected, rel=1e-12, abs=1e-18)
    assert rate(600, min_lr=min_lr) == pytest.approx((PEAK + min_lr) / 2)
    assert rate(1000, min_lr=min_lr) == rate(1005, min_lr=min_lr) == min_lr


def test_no_warm_up_starts_at_the_peak():
    assert rate(0, warmup_epochs=0) == PEAK


def test_warm_up_may_end_within_an_epoch():
    assert rate(5, warmup_epochs=0.5) == PEAK
    assert rate(3, warmup_epochs=0.5) == pytest.approx(0.6 * PEAK)


def test_set_learning_rate_keeps_the_scale_of_a_group():
    groups = [{"lr": 0.0}, {"lr": 0.0, "lr_scale": 0.5}]
    set_learning_rate(groups, 0.2)
    assert [group["lr"] for group in groups] == [0.2, 0.1]


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def optimizers() -> tuple[list[nn.Module], GuardedAdamW, torch.optim.AdamW]:
    models = [small_model(), small_model()]
    arguments = {"lr": 1e-2, "betas": (0.9, 0.95)}
    guarded = GuardedAdamW(parameter_groups(models[0], 0.05), **arguments)
    return models, guarded, torch.optim.AdamW(parameter_groups(models[1], 0.05), **arguments)


def set_gradients(models: list[nn.Module], step: int) -> None:
    for model in models:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_guarded_adamw_is_adamw_bit_for_bit_on_finite_gradients():
    models, guarded, plain = optimizers()
    start = [p.clone() for p in models[0].parameters()]
    for step in range(5):
        set_gradients(models, step)
        guarded.step()
        plain.step()
    assert not guarded.overflow
    norm = torch.cat([p.grad.flatten() for p in models[0].parameters()]).norm()
    assert guarded._global_grad_norm == pytest.approx(norm.item(), rel=1e-6)
    for before, ours, theirs in zip(start, models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_guarded_adamw_skips_a_non_finite_gradient_and_continues(bad: float):
    models, guarded, plain = optimizers()
    set_gradients(models, 0)
    guarded.step()
    plain.step()
    set_gradients(models, 1)
    models[0][2].bias.grad[1] = bad
    guarded.step()
    assert guarded.overflow
    assert not math.isfinite(guarded._global_grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    set_gradients(models, 2)  # moments and step counts were left alone as well
    guarded.step()
    plain.step()
    assert not guarded.overflow
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
