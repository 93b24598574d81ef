"""Four optimizer steps of small classifiers on fixed random batches, with our loop on DeepSpeed or in plain torch.

As a script, this is one rank of a launch that runs many jobs, like steps.py for pretraining: each trains to the end and
again from the checkpoint in the middle. The plain version has its own parameter groups, LARS and moving average.
"""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from downstream.classify.config import FinetuneConfig, load
from downstream.classify.model import Classifier, build_classifier
from helpers.processes import SMALL
from helpers.steps import BATCH, MIDDLE, POISONED, STEPS, FixedBatches, do_jobs, global_batch, poison, small_settings
from pretrain.trainer.launch import World
from pretrain.trainer.optim import learning_rate
from pretrain.trainer.run_folder import RunFolder
from pretrain.trainer.seed import seed_step

CLASSES = 6  # even, because ZeRO-3 pads odd partitions with uninitialized memory


def run_jobs(start: Callable[..., Any], folder: Path, jobs: dict[str, list[str]]) -> None:
    """Like `steps.run_jobs`, with `state.pt` and `model.safetensors` in each run folder."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    start(folder, script=__file__).finish()


def configure(recipe: str, *overrides: str) -> FinetuneConfig:
    return load(
        recipe,
        [f"train.global_batch_size={BATCH}", f"checkpoint.every_steps={MIDDLE}", "optim.warmup_epochs=0", *overrides],
    )


def build_small(config: FinetuneConfig, load_start: bool = True) -> Classifier:
    with SMALL:
        return build_classifier(config, load_start=load_start)[0]


def draw_label(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"labels": rng.integers(CLASSES)}


def plain_groups(vit: Any, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Return one group per trained parameter, by BEiT's rule as implemented by the authors of MAE and LoMaR."""
    groups = []
    depth = len(vit.blocks)
    for name, parameter in vit.named_parameters():
        if not parameter.requires_grad:
            continue
        block = re.match(r"blocks\.(\d+)\.", name)
        layer = depth + 1  # the head, and the norm after pooling
        if block:
            layer = int(block[1]) + 1
        elif name.startswith(("patch_embed", "cls_token", "pos_embed")):
            layer = 0
        elif name.startswith("norm."):  # timm counts it as part of the last block
            layer = depth
        decays = parameter.ndim > 1 and name not in ("cls_token", "pos_embed") and "rpe_bias" not in name
        scale = config.optim.layer_decay ** (depth + 1 - layer)
        groups.append({"params": [parameter], "scale": scale, "weight_decay": config.optim.weight_decay * decays})
    return groups


class PlainLars:
    """MAE's LARS: gradients of matrices, not vectors, are scaled by 0.001 |weight| / |gradient| before the momentum."""

    def __init__(self, groups: list[dict[str, Any]], momentum: float):
        self.param_groups, self.momentum = groups, momentum
        self.velocity: dict[Any, Tensor] = {}

    def zero_grad(self) -> None:
        for group in self.param_groups:
            group["params"][0].grad = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            (parameter,) = group["params"]
            update = parameter.grad
            if parameter.ndim > 1:
                update = update * 0.001 * parameter.norm() / update.norm()
            velocity = self.velocity.get(parameter, torch.zeros_like(update)) * self.momentum + update
            self.velocity[parameter] = velocity
            parameter -= group["lr"] * velocity


def plain_steps(config: FinetuneConfig) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Train in one process without DeepSpeed; returns (loss, gradient norm) of each step and float64 moving averages.

    If mixing draws random numbers, it simulates the two ranks one after the other. Otherwise, one rank takes the whole
    batch, which is the same for batch normalization that is synchronized across ranks.
    """
    classifier, parts = build_small(config), config.train.gradient_accumulation_steps
    ranks = 2 if config.augment.mixes else 1
    groups = plain_groups(classifier.vit, config)
    optimizer: Any = PlainLars(groups, config.optim.momentum)
    if config.optim.name == "adamw":
        optimizer = torch.optim.AdamW(groups, betas=config.optim.betas)
    averages = {name: p.detach().double() for name, p in classifier.named_parameters()}
    results = []
    for step in range(STEPS):
        rate = learning_rate(step - (step > POISONED), STEPS, 1, config.peak_lr, config.optim)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.zero_grad()
        losses = []
        images, drawn = global_batch(step, draw_label, config)
        for part, rank in itertools.product(range(parts), range(ranks)):
            seed_step(config.seed, step, part, rank)
            share = BATCH // (parts * ranks)
            mine = slice((part * ranks + rank) * share, (part * ranks + rank + 1) * share)
            losses.append(classifier(images[mine], drawn["labels"][mine])["loss"])
            (losses[-1] / (parts * ranks)).backward()
        norm = torch.nn.utils.clip_grad_norm_(classifier.parameters(), config.optim.clip_grad or 1e9)
        if step != POISONED:
            optimizer.step()
            if config.ema:
                m = config.ema.decay
                averages = {
                    name: m * averages[name] + (1 - m) * p.detach() for name, p in classifier.named_parameters()
                }
        results.append((torch.stack(losses).mean().item(), norm.item()))
    return results, averages


class NoIndex:
    fingerprint = shrunk = ""
    shards: tuple[str, ...] = ()
    shard_bytes = shard_sizes = np.empty(0, np.int64)
    checksum = None

    def __len__(self) -> int:
        return STEPS * BATCH


def train_small(
    classifier: Classifier, config: FinetuneConfig, world: World, device: torch.device, folder: RunFolder
) -> int:
    """Do what downstream/classify/finetune.py does, on fixed batches; returns the step from which it continued."""
    from downstream.classify.build import build_ema
    from downstream.classify.finish import finish
    from downstream.classify.optimizers import build_optimizer
    from pretrain.trainer.assemble import Parts, assemble
    from pretrain.trainer.engine import gather_state_dict, zero_stage
    from pretrain.trainer.loop import train

    loader: Any = FixedBatches(config, draw_label, world)
    index: Any = NoIndex()
    settings = small_settings(config, world.size)
    optimizer = build_optimizer(classifier.vit, config, zero_stage(settings))
    parts = Parts(classifier, optimizer, build_ema(config, classifier, device), loader)
    run = assemble(config, world, device, folder, index, settings, parts)
    began = run.state.step
    train(run)
    finish(run, ())
    weights = gather_state_dict(run.engine, world)
    if world.is_main:
        torch.save(weights, folder.root / "state.pt")
    run.engine.destroy()
    return began


def do_job(config: FinetuneConfig, world: World, device: torch.device, root: Path) -> None:
    whole, again = RunFolder(root / "whole"), RunFolder(root / "resumed")
    if world.is_main:
        whole.checkpoints.mkdir(parents=True)
    torch.distributed.barrier()
    classifier = build_small(config)
    if world.rank == 1:
        poison(classifier, config)
    assert train_small(classifier, config, world, device, whole) == 0
    if world.is_main:
        shutil.copytree(whole.root, again.root, ignore=shutil.ignore_patterns(f"step_{STEPS:08d}"))
    torch.distributed.barrier()
    elsewhere = build_small(config.model_copy(update={"seed": config.seed + 1}), load_start=False)
    assert train_small(elsewhere, config, world, device, again) == MIDDLE


if __name__ == "__main__":
    do_jobs(configure, do_job)
