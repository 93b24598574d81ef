"""One rank of a leg of several small trainings: each resumes, and is stopped by a signal after a given step.

`python legs.py FOLDER STEP`: FOLDER has jobs.json (name -> kind and config arguments) and a run folder for each job. If
STEP is the last step, the trainings run to their end.
"""

import gc
import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from helpers import finetune_steps, steps
from pretrain.trainer import signals
from pretrain.trainer.launch import exit_process, find_world, init_distributed
from pretrain.trainer.run_folder import RunFolder

EPOCHS, BATCH = 3, 12  # divisible by 1 to 4 ranks
END = EPOCHS * steps.STEPS
KEYS = [f"train.epochs={EPOCHS}", f"train.global_batch_size={BATCH}", "checkpoint.every_steps=1000"]


def stop_after(module: torch.nn.Module, forwards: int) -> None:
    """Send a signal in the given forward pass, so that the run saves and stops after that step."""
    calls = itertools.count(1)

    def send(*_: Any) -> None:
        if next(calls) == forwards:
            os.kill(os.getpid(), signal.SIGUSR1)

    module.register_forward_pre_hook(send)


def main() -> None:
    root, until = Path(sys.argv[1]), int(sys.argv[2])
    world = find_world()
    device = init_distributed(world)
    signals.watch_signals()
    for name, (kind, arguments) in json.loads((root / "jobs.json").read_text()).items():
        folder = RunFolder(root / name)
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        latest = folder.checkpoints / "latest"
        began = int(latest.read_text().removeprefix("step_")) if latest.exists() else 0
        torch.distributed.barrier()
        helper: Any = {"pretrain": steps, "finetune": finetune_steps}[kind]
        config = helper.configure(*arguments, *KEYS, *sys.argv[3:])
        module = helper.build_small(config.model_copy(update={"seed": config.seed + (began > 0)}))
        if until < END:
            stop_after(module, until - began)
        try:
            helper.train_small(module, config, world, device, folder)
        except signals.Stopped as stopped:
            print(f"job {name}, from {began}: {stopped}", flush=True)
        signals._received.clear()
        gc.collect()  # the hooks of an engine form reference cycles
    exit_process(0)


if __name__ == "__main__":
    main()
