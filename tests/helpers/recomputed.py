"""A substitute for CUDA graphs on a CPU: recordings that recompute on the current values of their inputs."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from pretrain.trainer import cuda_graphs


class Recomputed:
    """Like `cuda_graphs.Recording`, except that `result` holds new tensors after a replay."""

    def __init__(self, function: Callable[[], Any], before: "Recomputed | None" = None):
        self.function, self.replays = function, 0
        self.replay()

    def replay(self) -> None:
        with torch.enable_grad():
            self.result = self.function()
        self.replays += 1


@contextmanager
def graphs_on_a_cpu() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(patch.object(cuda_graphs, "Recording", Recomputed))
        stack.enter_context(patch.object(cuda_graphs, "warm_up", lambda function: function()))
        stack.enter_context(patch.object(torch.cuda, "get_rng_state", lambda: None))
        stack.enter_context(patch.object(torch.cuda, "set_rng_state", lambda state: None))
        yield
