"""`compiled_gradients.py OUT STAGE ...`: gradient norms of a small LoMaR in DeepSpeed engines, eager and compiled.

Run stage 3 in a separate process, since it permanently patches torch.
"""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch

from helpers.processes import SMALL
from helpers.tiny import random_images, random_mask_indices
from pretrain.build import build_method
from pretrain.config import load
from pretrain.models.vit import Block
from pretrain.trainer.launch import exit_process, find_world, init_distributed
from pretrain.trainer.nonfinite import NonfiniteGuard

OVERRIDES = (
    *("data.shards=none", "data.image_size=64", "model.arch=vit_tiny", "method.num_windows=2", "method.window_size=3"),
    *("train.global_batch_size=2", "train.gradient_accumulation_steps=1", "train.precision=fp32"),
)


class GuardedSGD(NonfiniteGuard, torch.optim.SGD):
    """SGD for stage 0. A step with learning rate 1 subtracts the gradient, so it can be read in every stage."""


def gradient_norms(stage: int, compiled: bool) -> dict[str, float]:
    from deepspeed.utils import safe_get_full_fp32_param

    from pretrain.trainer.engine import build_engine, ds_settings

    config = load("lomar_vitb16_224_400e", [*OVERRIDES, f"train.ds_config=zero{stage}"])
    with SMALL:
        method = build_method(config)
    images, mask_indices = random_images(method), random_mask_indices(method)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    for block in method.modules():
        if compiled and isinstance(block, Block):
            block.compile(backend="aot_eager", dynamic=False)
    optimizer = GuardedSGD(method.parameters(), lr=1.0) if stage == 0 else torch.optim.SGD(method.parameters(), lr=1.0)
    engine = build_engine(method, optimizer, config, ds_settings(config, 1))
    engine.backward(engine(images, mask_indices)["loss"])
    engine.step()
    after = {name: p if stage == 0 else safe_get_full_fp32_param(p) for name, p in method.named_parameters()}
    norms = {name: (before[name] - after[name].detach()).norm().item() for name in before}
    engine.destroy()
    return norms


if __name__ == "__main__":
    world = find_world()
    init_distributed(world)
    norms = {}
    with patch("torch._dynamo.config.suppress_errors", False):
        for stage in map(int, sys.argv[2:]):
            torch.manual_seed(0)
            norms[stage] = {kind: gradient_norms(stage, kind == "compiled") for kind in ("eager", "compiled")}
    Path(sys.argv[1]).write_text(json.dumps(norms))
    exit_process(0)
