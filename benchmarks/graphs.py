"""Counts the graphs that torch.compile makes of a method's blocks, with a backend that compiles nothing."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pretrain.build import build_method
from pretrain.config import PretrainConfig
from pretrain.models.cross_decoder import CrossBlock
from pretrain.models.vit import Block


def count_graphs(config: PretrainConfig, batch: int = 2) -> int:
    """Counts all blocks' graphs in two training steps, in bf16 on the CPU: one for each shape of sequences.

    Raises:
        torch._dynamo.exc.Unsupported: a block has a graph break.
    """
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    method = build_method(config)
    samples = [method.mask_sampler()(np.random.default_rng(i)) for i in range(batch)]
    indices = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
    images = torch.randint(0, 256, (batch, *config.data.height_width, 3), dtype=torch.uint8)
    torch._dynamo.reset()
    for part in method.modules():
        if isinstance(part, Block | CrossBlock):
            part.compile(backend=backend, fullgraph=True, dynamic=False)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = method(images, indices)["loss"]
        loss.backward()
    torch._dynamo.reset()
    assert all(p.grad is not None for p in method.parameters())
    return len(graphs)
