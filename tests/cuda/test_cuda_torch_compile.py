"""Compiled blocks on a GPU: one graph each, no breaks, nothing compiled again, and eager's losses."""

from collections.abc import Iterator

import pytest
import torch
from helpers.gpu_steps import build, cases, configure, run_step
from torch._dynamo.utils import counters

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# Blocks, the patch projection and the target's loss; where mask tokens join late, the blocks before and after that.
@pytest.mark.parametrize(("case", "graphs"), [("lomar-late-pr_mim", 4), ("mae", 4)])
def test_compiled_is_eager_in_few_graphs(case: str, graphs: int, device: torch.device):
    steps = {}
    for compiled in ("off", "on"):
        config = configure(cases()[case], compile=compiled)
        method = build(config, device)
        steps[compiled] = run_step(method, config, device, bf16=True)
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] == graphs
    again = run_step(method, config, device, bf16=True)
    assert counters["stats"]["unique_graphs"] == graphs, "the second step compiled something again"
    assert torch.equal(again.loss, steps["on"].loss)
    assert steps["on"].loss.item() == pytest.approx(steps["off"].loss.item(), rel=5e-3)
    for name, gradient in steps["off"].gradients.items():
        compiled_gradient = steps["on"].gradients[name]
        assert (compiled_gradient - gradient).norm() < 0.05 * gradient.norm(), name
        assert torch.equal(again.gradients[name], compiled_gradient), name
