"""One step of every method, alone and with add-ons, on a GPU equals fp32 on a CPU within the precision's tolerance."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.gpu_steps import Step, build, cases, configure, run_step

pytestmark = pytest.mark.cuda
CASES = cases()
IN_WINDOWS = [name for name in CASES if name.startswith("lomar") and name.split("-")[1:2] != ["beit"]]


@pytest.fixture(autouse=True)
def exact_fp32() -> Iterator[None]:
    """Disables TF32, with which cuDNN computes fp32 convolutions by default (10 bits of mantissa)."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@functools.cache
def on_cpu(case: str) -> Step:
    config = configure(CASES[case])
    return run_step(build(config, torch.device("cpu")), config, torch.device("cpu"), bf16=False)


def error(measured: torch.Tensor, exact: torch.Tensor) -> float:
    return float((measured - exact).norm() / exact.norm())


def flat(step: Step) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in step.gradients.values()])


def on_device(case: str, device: torch.device, precision: str, **model: str) -> tuple[Step, Any]:
    config = configure(CASES[case], precision=precision, **model)
    method = build(config, device)
    step = run_step(method, config, device, bf16=precision == "bf16")
    assert step.gradients.keys() == on_cpu(case).gradients.keys()
    return step, method


def check_bf16(step: Step, case: str) -> None:
    """Tolerances follow from measurements: bf16 on a CPU changes the loss by up to 0.0015, and gradients by up to 0.02.

    LUT normalizes features over the batch. Before training they hardly differ, which amplifies rounding: up to 0.21.
    """
    exact, lut = on_cpu(case), "lut" in case
    assert error(step.loss, exact.loss) < 5e-3
    assert error(flat(step), flat(exact)) < (0.5 if lut else 0.05)
    if not lut:
        for name, gradient in exact.gradients.items():
            assert error(step.gradients[name], gradient) < 0.2, name


@pytest.mark.parametrize("case", IN_WINDOWS)
def test_bf16_with_the_window_kernel_is_close_to_fp32(case: str, device: torch.device):
    step, method = on_device(case, device, "bf16", attention="triton" if device.type == "cuda" else "auto")
    assert method.encoder.window_kernel == (device.type == "cuda")
    check_bf16(step, case)


@pytest.mark.parametrize("case", CASES)
def test_bf16_without_the_window_kernel_is_close_to_fp32(case: str, device: torch.device):
    step, method = on_device(case, device, "bf16", attention="sdpa")
    assert not method.encoder.window_kernel
    check_bf16(step, case)


@pytest.mark.parametrize("case", CASES)
def test_fp32_matches_cpu_fp32(case: str, device: torch.device):
    step, _ = on_device(case, device, "fp32")
    assert error(step.loss, on_cpu(case).loss) < 1e-5
    assert error(flat(step), flat(on_cpu(case))) < 1e-3


@pytest.mark.parametrize("case", ["lomar", "lomar-late-pr_mim", "mae"])
def test_bf16_residual_stream_is_close_to_fp32(case: str, device: torch.device):
    """Residual sums are rounded as well, so four times the error is allowed."""
    step, _ = on_device(case, device, "bf16", residual="bf16")
    assert error(step.loss, on_cpu(case).loss) < 2e-2
    assert error(flat(step), flat(on_cpu(case))) < 0.2


@pytest.mark.parametrize("case", CASES)
def test_repeated_steps_are_bitwise_identical(case: str, device: torch.device):
    first, second = (on_device(case, device, "bf16")[0] for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name]), name
