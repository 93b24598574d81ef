"""Compiled blocks on a GPU: few graphs, no graph breaks, no recompilation, and results close to eager."""

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


# Graphs of blocks, patch projection and target loss; late mask tokens split the blocks into those before and after.
@pytest.mark.parametrize(("case", "graphs"), [("lomar-late-pr_mim", 4), ("mae", 4)])
def test_compiled_step_has_few_graphs_and_is_close_to_eager(case: str, graphs: int, device: torch.device):
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
