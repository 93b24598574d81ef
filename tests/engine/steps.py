"""Four optimiser steps of a small LoMaR on fixed random batches: by DeepSpeed as a rank's script, or by plain torch.

The third step's loss is made non-finite on one rank, in one micro-batch.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from pretrain.build import build_method
from pretrain.config import Config, load
from pretrain.faults import poison_nonfinite
from pretrain.launch import find_world, leave, start
from pretrain.models import vit
from pretrain.optim import parameter_groups

STEPS, POISONED, BATCH = 4, 2, 16
SCRIPT = __file__


def configure(recipe: str, overrides: list[str]) -> Config[Any]:
    return load(recipe, [f"train.batch={BATCH}", *overrides])


def build_small(config: Config[Any]) -> Any:
    """The method around an encoder of two narrow blocks."""
    with patch.dict(vit.ARCHS, vit_tiny=vit.Arch(32, 2, 2)):
        return build_method(config)


def batch(step: int, view: Any) -> tuple[Tensor, dict[str, Tensor]]:
    rng = np.random.default_rng(step)
    images = torch.from_numpy(rng.integers(0, 256, (BATCH, 64, 80, 3), dtype=np.uint8))
    views = [view(rng) for _ in range(BATCH)]
    return images, {name: torch.from_numpy(np.stack([v[name] for v in views])) for name in views[0]}


def plain_steps(config: Config[Any]) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step of one process without DeepSpeed; the poisoned step is left out."""
    method = build_small(config)
    groups = parameter_groups(method, config.optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.peak_lr, betas=config.optim.betas)
    results = []
    for step in range(STEPS):
        loss = method(*batch(step, method.view()))["loss"]
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(method.parameters(), config.optim.clip_grad or 1e9)
        if step != POISONED:
            optimizer.step()
        results.append((loss.item(), norm.item()))
    return results


def main() -> None:
    from pretrain.engine import build_engine, ds_settings, effective_settings

    out, recipe, *overrides = sys.argv[1:]
    world = find_world()
    start(world)
    config = configure(recipe, overrides)
    method = build_small(config)
    view = method.view()
    engine = build_engine(method, config, ds_settings(config, world.size))
    micro = BATCH // (world.size * config.train.accumulation)
    results = []
    for step in range(STEPS):
        images, views = batch(step, view)
        losses = []
        for part in range(config.train.accumulation):
            mine = slice((part * world.size + world.rank) * micro, (part * world.size + world.rank + 1) * micro)
            loss = engine(images[mine], {name: index[mine] for name, index in views.items()})["loss"]
            losses.append(loss.detach())
            poisoned = step == POISONED and part == 0 and world.rank == 1
            engine.backward(poison_nonfinite(loss * float("inf") if poisoned else loss))
            engine.step()
        mean = torch.stack(losses).mean()
        torch.distributed.all_reduce(mean)
        results.append((mean.item() / world.size, float(engine.get_global_grad_norm()), engine.was_step_applied()))
    if world.is_main:
        Path(out).write_text(json.dumps({"steps": results, "effective": effective_settings(engine)}))
    leave(0)


if __name__ == "__main__":
    main()
