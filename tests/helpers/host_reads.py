"""Counts what the host waits for in each step of a real stage-0 run on one rank: tensor reads and synchronizations.

They are counted because both cost nothing on a CPU: `item()`, `bool()` and `float()` of a tensor call
`aten::_local_scalar_dense`. As a script, `host_reads.py FOLDER RECIPE [key=value ...]` trains and writes the counts of
each step to FOLDER/counts.json.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.steps import build_small, configure, train_small
from pretrain.trainer.launch import exit_process, find_world, init_distributed
from pretrain.trainer.run_folder import RunFolder


class HostReads(TorchDispatchMode):
    """Counts the numbers that are read from tensors while it is active."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def main() -> None:
    folder = Path(sys.argv[1])
    world = find_world()
    device = init_distributed(world)
    from deepspeed.accelerator import get_accelerator

    from pretrain.trainer import loop

    config = configure(*sys.argv[2:])
    counts: list[dict[str, int]] = []
    step = loop._step

    def counted(*arguments: Any) -> float:
        with HostReads() as reads, patch.object(get_accelerator(), "synchronize") as synchronize:
            rate = step(*arguments)
        counts.append({"reads": reads.count, "synchronized": synchronize.call_count})
        return rate

    with patch.object(loop, "_step", counted):
        run = RunFolder(folder / "run")
        run.root.mkdir()
        train_small(build_small(config), config, world, device, run)
    (folder / "counts.json").write_text(json.dumps(counts))
    exit_process(0)


if __name__ == "__main__":
    main()
