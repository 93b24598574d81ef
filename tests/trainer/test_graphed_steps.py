"""Training steps with CUDA graphs. On a CPU a fake recording recomputes them, to compare with plain autograd."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.recomputed import graphs_on_a_cpu
from helpers.tiny import random_images, random_mask_indices, tiny_lomar
from torch import nn

from pretrain.config import load
from pretrain.numerics import check_settings, choose_numerics
from pretrain.trainer import cuda_graphs
from pretrain.trainer.cuda_graphs import GraphedForward, graph_steps


@pytest.fixture(autouse=True)
def on_a_cpu() -> Iterator[None]:
    with graphs_on_a_cpu():
        yield


class Small(nn.Module):
    """Has a parameter that the loss does not depend on, a buffer that counts calls, and a second output to log."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor, targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.training:
            self.calls += 1
        error = self.used(x) - targets["y"]
        return {"loss": error.pow(2).mean(), "largest": error.abs().max()}


def batch(seed: int, size: int = 3) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator), {"y": torch.randn(size, 4, generator=generator)}


def captured(module: nn.Module) -> Any:
    """Makes a module train with graphs, and returns them after a first call has captured them."""
    graph_steps(module, stage=0)
    forward = module.forward
    assert isinstance(forward, GraphedForward)
    module(*batch(0))
    assert forward._graphs is not None
    return forward._graphs


@pytest.mark.parametrize("stage", [0, 1])
def test_gradients_of_micro_batches_are_accumulated_and_scaled(stage: int):
    module, plain = Small(), Small()
    plain.load_state_dict(module.state_dict())
    graph_steps(module, stage)
    for step in range(2):
        for one in (module, plain):
            one.zero_grad()
            for seed in range(3):
                (one(*batch(3 * step + seed))["loss"] / 3).backward()
        assert module.unused.weight.grad is None
        for mine, theirs in zip(module.used.parameters(), plain.used.parameters(), strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            assert torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize("stage", [0, 1])
def test_gradient_hooks_are_called_from_stage_1_on(stage: int):
    module = Small()
    graph_steps(module, stage)
    seen: list[torch.Tensor] = []
    for parameter in module.used.parameters():
        parameter.register_post_accumulate_grad_hook(seen.append)
    module(*batch(0))["loss"].backward()
    assert len(seen) == (2 if stage else 0)


class Odd(nn.Module):
    """Autograd gives the first two parameters the same gradient tensor, and the last one a transposed gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.matrix = (nn.Parameter(torch.ones(4, 4)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((self.a + self.b) * x + self.matrix.t() * x).pow(2).sum()}


def test_gradients_have_their_own_memory_and_their_parameters_layout():
    module, plain = Odd(), Odd()
    graph_steps(module, stage=0)
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    for one in (module, plain):
        optimizer = torch.optim.AdamW(one.parameters(), lr=0.1, fused=True)
        for _ in range(2):
            optimizer.zero_grad()
            one(x)["loss"].backward()
            torch.nn.utils.clip_grad_norm_(one.parameters(), 0.5)
            optimizer.step()
    for mine, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_outputs_belong_to_their_call_and_only_the_loss_needs_a_gradient():
    module, plain = Small(), Small()
    plain.load_state_dict(module.state_dict())
    graph_steps(module, stage=0)
    mine = [module(*batch(seed)) for seed in range(2)]
    theirs = [plain(*batch(seed)) for seed in range(2)]
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one["loss"], other["loss"])
        assert torch.equal(one["largest"], other["largest"])
        assert one["loss"].requires_grad
        assert not one["largest"].requires_grad


def test_evaluation_and_other_shapes_run_without_graphs():
    module = Small()
    graphs = captured(module)
    replays = graphs.forward.replays
    with torch.no_grad():
        module(*batch(1))
    module(*batch(1, size=2))
    module.eval()(*batch(1))
    assert graphs.forward.replays == replays
    module.train()(*batch(1))
    assert graphs.forward.replays == replays + 1


def test_parameters_that_moved_in_memory_are_captured_again():
    module, plain = Small(), Small()
    graph_steps(module, stage=0)
    module(*batch(0))
    for parameter, other in zip(module.parameters(), plain.parameters(), strict=True):
        parameter.data = other.data.clone()
    assert torch.equal(module(*batch(1))["loss"], plain(*batch(1))["loss"])


def test_capture_does_not_change_buffers():
    module = Small()
    captured(module)
    # The fake replay counts a call just as a replay on a GPU does: once, for the step itself.
    assert module.calls == 1


def test_method_trains_the_same_with_and_without_graphs():
    results = []
    for graphed in (False, True):
        torch.manual_seed(0)
        method = tiny_lomar()
        if graphed:
            graph_steps(method, stage=0)
        optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3)
        for seed in range(3):
            images, masks = random_images(method), random_mask_indices(method, seed=seed)
            method(images, masks)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(method.state_dict())
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


@pytest.mark.parametrize(
    ("overrides", "stage", "problem"),
    [
        ([], 3, "ZeRO stage 3"),
        (["model.grad_checkpointing=true"], 1, "grad_checkpointing"),
        (["lut.alpha=1.0", "data.crop=simple"], 1, "LUT"),
    ],
)
def test_settings_that_graphs_do_not_support_are_rejected(overrides: list[str], stage: int, problem: str):
    config = load("mae_vitb16_224_1600e", ["data.shards=none", "model.cuda_graphs=on", *overrides])
    with pytest.raises(ValueError, match=rf"{problem}.*set model\.cuda_graphs=auto"):
        check_settings(config, stage)


def test_graphs_need_a_gpu():
    config = load("mae_vitb16_224_1600e", ["data.shards=none", "model.cuda_graphs=on"])
    with pytest.raises(ValueError, match=r"needs a GPU: set model\.cuda_graphs=auto"):
        choose_numerics(config, torch.device("cpu"), 1)


def test_failed_capture_names_the_key_to_change(monkeypatch: pytest.MonkeyPatch):
    def fails(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graphs, "Recording", fails)
    module = Small()
    graph_steps(module, stage=0)
    with pytest.raises(ValueError, match=r"not permitted when stream is capturing\): set model\.cuda_graphs=off"):
        module(*batch(0))
