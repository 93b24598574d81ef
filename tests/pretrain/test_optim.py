"""Tests of the learning rate schedule, parameter groups, and the optimizer's guard against non-finite gradients."""

import copy
import math
from typing import Any

import pytest
import torch
from helpers.host_reads import HostReads
from torch import nn

from pretrain.models.vit import ViT
from pretrain.trainer.config import OptimConfig, RunConfig
from pretrain.trainer.nonfinite import NonfiniteGuard
from pretrain.trainer.optim import (
    GuardedAdamW,
    build_adamw,
    keep_fused,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)

PER_EPOCH, EPOCHS, PEAK = 10, 100, 2.4e-3


def rate(step: int, **optim: Any) -> float:
    return learning_rate(step, PER_EPOCH, EPOCHS, PEAK, OptimConfig(**({"warmup_epochs": 20} | optim)))


def test_warmup_is_linear_from_zero_to_the_peak():
    assert rate(0) == 0
    for step in range(201):
        assert rate(step) == pytest.approx(PEAK * step / 200, rel=1e-12)


@pytest.mark.parametrize("min_lr", [0.0, 1e-5])
def test_cosine_decay_follows_warmup(min_lr: float):
    for step in (200, 201, 333, 400, 600, 777, 999, 1000):
        angle = math.pi * (step - 200) / 800
        expected = min_lr + (PEAK - min_lr) * (1 + math.cos(angle)) / 2
        assert rate(step, min_lr=min_lr) == pytest.approx(expected, rel=1e-12, abs=1e-18)
    assert rate(600, min_lr=min_lr) == pytest.approx((PEAK + min_lr) / 2)
    assert rate(1000, min_lr=min_lr) == rate(1005, min_lr=min_lr) == min_lr


def test_without_warmup_the_rate_starts_at_the_peak():
    assert rate(0, warmup_epochs=0) == PEAK


def test_warmup_may_end_within_an_epoch():
    assert rate(5, warmup_epochs=0.5) == PEAK
    assert rate(3, warmup_epochs=0.5) == pytest.approx(0.6 * PEAK)


def test_step_schedule_divides_the_rate_at_each_step():
    steps = {"schedule": "steps", "step_epochs": (60, 90)}
    assert rate(100, **steps) == pytest.approx(PEAK / 2), "in the warm-up"
    assert rate(200, **steps) == rate(599, **steps) == PEAK
    assert rate(600, **steps) == rate(899, **steps) == pytest.approx(PEAK / 10)
    assert rate(900, **steps) == rate(1000, **steps) == pytest.approx(PEAK / 100)
    assert rate(900, **steps, step_factor=0.5, min_lr=PEAK / 3) == PEAK / 3


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({}, "optim.schedule=steps: set optim.step_epochs, for example to [350]"),
        ({"step_epochs": [400]}, "optim.step_epochs=[400.0] must be less than train.epochs=400"),
        ({"step_epochs": [300, 200]}, "optim.step_epochs=[300.0, 200.0]: the epochs must increase"),
        (
            {"step_epochs": [30]},
            "optim.step_epochs=[30.0]: the epochs must increase, from optim.warmup_epochs=40 or later",
        ),
    ],
)
def test_unreachable_or_unordered_step_epochs_are_rejected(optim: dict[str, Any], message: str):
    with pytest.raises(ValueError, match="optim") as error:
        RunConfig(name="x", data={"shards": "x"}, optim={"schedule": "steps", **optim})
    assert message in str(error.value)


def test_peak_rate_scales_with_the_batch_size():
    keys = {"name": "x", "data": {"shards": "x"}, "train": {"global_batch_size": 2048}}
    assert RunConfig(**keys, optim={"base_lr": 1e-4}).peak_lr == pytest.approx(8e-4)
    assert RunConfig(**keys, optim={"base_lr": 1e-4, "lr_batch_size": 512}).peak_lr == pytest.approx(4e-4)


def test_decay_class_token_false_exempts_only_the_class_token():
    encoder = ViT("vit_tiny", 16, (2, 2))
    decayed = [
        {id(p) for p in parameter_groups(encoder, 0.05, decay_class_token)[0]["params"]}
        for decay_class_token in (True, False)
    ]
    assert decayed[0] - decayed[1] == {id(encoder.cls_token)}
    assert all(p.ndim > 1 for p in parameter_groups(encoder, 0.05)[0]["params"])


def test_set_learning_rate_applies_the_lr_scale_of_a_group():
    groups = [{"lr": 0.0}, {"lr": 0.0, "lr_scale": 0.5}]
    set_learning_rate(groups, 0.2)
    assert [group["lr"] for group in groups] == [0.2, 0.1]


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


class GuardedSGD(NonfiniteGuard, torch.optim.SGD):
    """An optimizer that does not read `found_inf` itself, like LARS."""


KINDS = {"fused": (GuardedAdamW, torch.optim.AdamW), "others": (GuardedSGD, torch.optim.SGD)}


def optimizers(kind: str = "fused") -> tuple[list[nn.Module], Any, torch.optim.Optimizer]:
    models = [small_model(), small_model()]
    options: Any = {"lr": 1e-2, **({"fused": True, "betas": (0.9, 0.95)} if kind == "fused" else {"momentum": 0.9})}
    guarded, plain = (
        cls(parameter_groups(model, 0.05), **options) for cls, model in zip(KINDS[kind], models, strict=True)
    )
    return models, guarded, plain


def set_gradients(models: list[nn.Module], step: int) -> None:
    for model in models:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def clip(optimizer: torch.optim.Optimizer, limit: float) -> torch.Tensor:
    return torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], limit)


def assert_same_weights(models: list[nn.Module]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_guarded_optimizer_is_bitwise_identical_on_finite_gradients(kind: str):
    models, guarded, plain = optimizers(kind)
    start = [p.clone() for p in models[0].parameters()]
    for step in range(5):
        set_gradients(models, step)
        guarded.step()
        plain.step()
        assert not guarded.skipped
    norm = torch.cat([p.grad.flatten() for p in models[0].parameters()]).norm()
    assert float(guarded._global_grad_norm) == pytest.approx(norm.item(), rel=1e-6)
    assert_same_weights(models)
    for before, after in zip(start, models[0].parameters(), strict=True):
        assert not torch.equal(before, after)


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_is_bitwise_identical_to_torch(kind: str):
    models, guarded, plain = optimizers(kind)
    guarded.clip_grad = 0.1
    for step in range(3):
        set_gradients(models, step)
        guarded.step()
        norm = clip(plain, 0.1)
        plain.step()
        assert torch.equal(guarded._global_grad_norm, norm)
    assert_same_weights(models)


@pytest.mark.parametrize("limit", [0.0, 0.1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("skipped_step", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_with_non_finite_gradients_are_skipped(kind: str, skipped_step: int, bad: float, limit: float):
    """Weights, moments and step counts equal those of training without that step."""
    models, guarded, plain = optimizers(kind)
    guarded.clip_grad = limit
    for step in range(5):
        set_gradients(models, step)
        if step == skipped_step:
            models[0][2].bias.grad[1] = bad
            weights, state = copy.deepcopy([list(models[0].parameters()), guarded.state_dict()["state"]])
            guarded.step()
            assert guarded.skipped
            assert not math.isfinite(guarded._global_grad_norm)
            assert all(torch.equal(a, b) for a, b in zip(weights, models[0].parameters(), strict=True))
            assert step == 0 or same_state(state, guarded.state_dict()["state"])
            continue
        guarded.step()
        if limit:
            clip(plain, limit)
        plain.step()
        assert not guarded.skipped
    assert_same_weights(models)
    assert same_state(guarded.state_dict()["state"], plain.state_dict()["state"])


def same_state(first: dict[int, Any], second: dict[int, Any]) -> bool:
    assert first
    return first.keys() == second.keys() and all(
        torch.equal(value, second[number][key]) for number, state in first.items() for key, value in state.items()
    )


@pytest.mark.parametrize(("kind", "reads"), [("fused", 0), ("others", 1)])
def test_only_a_fused_step_avoids_reading_from_the_device(kind: str, reads: int):
    models, guarded, _ = optimizers(kind)
    guarded.clip_grad = 0.1
    for step in range(3):
        set_gradients(models, step)
        with HostReads() as mode:
            guarded.step()
        assert mode.count == reads
    with HostReads() as mode:
        assert not guarded.skipped
    assert mode.count == 1, "the mode sees what it is for"


def test_adamw_is_fused_in_every_zero_stage():
    config = RunConfig(name="x", data={"shards": "unused"})
    for stage in range(4):
        optimizer = build_adamw(parameter_groups(small_model(), 0.05), config, stage)
        assert all(group["fused"] for group in optimizer.param_groups)
        assert isinstance(optimizer, NonfiniteGuard) == (stage == 0)


def test_keep_fused_restores_fused_options_after_loading():
    """Loading brings back the saved optimizer's options and step count types; `keep_fused` corrects both."""
    models, guarded, _ = optimizers()
    saved = torch.optim.AdamW(parameter_groups(models[1], 0.05), lr=1e-2, betas=(0.9, 0.95))
    set_gradients(models, 0)
    saved.step()
    guarded.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert not any(group["fused"] for group in guarded.param_groups), "torch lets the saved options win"
    first = next(iter(guarded.state.values()))
    first["step"] = first["step"].double()
    keep_fused(guarded)
    assert all(group["fused"] for group in guarded.param_groups)
    assert {state["step"].dtype for state in guarded.state.values()} == {torch.float32}
    set_gradients(models, 1)
    models[0].load_state_dict(models[1].state_dict())
    guarded.step()
    saved.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
