"""CUDA graphs: every method gives the same results as without them, also on inputs other than the captured ones."""

import pytest
import torch
from helpers.gpu_steps import build, cases, configure, run_step

from pretrain.numerics import cuda_graphs_obstacle
from pretrain.trainer.cuda_graphs import GraphedForward, graph_steps

pytestmark = pytest.mark.cuda
CASES = [name for name, sections in cases().items() if not cuda_graphs_obstacle(configure(sections), stage=0)]


@pytest.mark.parametrize(("case", "stage"), [*((case, 0) for case in CASES), (CASES[0], 1)])
def test_graph_gives_the_same_loss_and_gradients_as_eager(case: str, stage: int, device: torch.device):
    if device.type != "cuda":
        pytest.skip("CUDA graphs are for GPUs; tests/trainer has a recording for the CPU")
    config = configure(cases()[case])
    method, plain = build(config, device), build(config, device)
    graph_steps(method, stage)
    for step in (0, 1, 0):
        mine, theirs = (run_step(one, config, device, bf16=True, step=step) for one in (method, plain))
        assert torch.allclose(mine.loss, theirs.loss, rtol=1e-4)
        assert mine.gradients.keys() == theirs.gradients.keys()
        for name, gradient in theirs.gradients.items():
            assert (mine.gradients[name] - gradient).norm() <= 1e-2 * gradient.norm() + 1e-6, name
    assert isinstance(method.forward, GraphedForward)


def test_capture_failure_raises_an_error_that_names_the_key(device: torch.device):
    if device.type != "cuda":
        pytest.skip("CUDA graphs are for GPUs")

    class SynchronizingLinear(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            loss = super().forward(x).sum()
            return {"loss": loss * float(loss.detach())}

    module = SynchronizingLinear(4, 4).to(device)
    graph_steps(module, stage=0)
    with pytest.raises(ValueError, match=r"set model\.cuda_graphs=off"):
        module(torch.ones(2, 4, device=device))
    assert float(torch.ones(1, device=device)) == 1  # the GPU is still usable
