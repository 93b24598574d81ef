"""A few hundred optimizer steps, by all ranks together and with the same weights on all of them.

Each rank computes the gradients of the samples of a batch that it has in memory. Nothing is drawn from the process's
generators: random numbers depend only on the seed here and on the pass, step or sample.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from data.draw import permutation
from pretrain.trainer.optim import set_learning_rate

SEED = 0
WARMUP = 0.1  # of all steps


def generator(*numbers: int) -> np.random.Generator:
    """A generator for `data.draw` that depends on these numbers alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([SEED, *numbers])))


def normal(shape: tuple[int, ...], std: float, number: int) -> Tensor:
    """Initial values, fp32: normally distributed, from the `number`-th generator of this module."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED + number)) * std


def draw_batches(samples: np.ndarray, batch_size: int, steps: int) -> Iterator[np.ndarray]:
    """The samples of each of `steps` batches: in a new order for every pass, without the incomplete last batch.

    Args:
        samples: int64 (N,), N >= 1; if fewer than `batch_size`, each batch is all of them.
        batch_size, steps: over all ranks together.
    """
    batch_size = min(batch_size, len(samples))
    per_pass = len(samples) // batch_size
    for step in range(steps):
        number, index = divmod(step, per_pass)
        if index == 0:
            order = samples[permutation(generator(number), len(samples))]
        yield order[index * batch_size : (index + 1) * batch_size]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over `WARMUP` of the steps, then half a cosine down to 0, which no step reaches."""
    warmup = max(round(WARMUP * steps), 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / (steps - warmup + 1)))


def fit(
    groups: list[dict[str, Any]],
    losses: Callable[[int, np.ndarray], Tensor],
    batches: Iterable[np.ndarray],
    mine: Callable[[int], bool],
    *,
    steps: int,
    peak_lr: float,
    at_once: int,
    world_size: int,
    description: str,
) -> None:
    """Runs AdamW on the mean of a batch's losses; gradients are summed over the ranks.

    Args:
        groups: parameter groups, in which `lr_scale` scales the rate; the same values on all ranks.
        losses: (step, (b,) samples of this rank) -> their losses (b,), with gradients of the parameters.
        batches: as from `draw_batches`.
        mine: whether a sample is in this rank's memory; every sample is in exactly one rank's.
        steps, peak_lr: how many batches, and the highest learning rate.
        at_once: samples whose activations are kept at the same time.
        world_size: number of ranks.
        description: label of the progress bar.
    """
    optimizer = torch.optim.AdamW(groups, lr=peak_lr)
    parameters = [parameter for group in groups for parameter in group["params"]]
    quiet = world_size > 1 and dist.get_rank() != 0
    for step, batch in enumerate(tqdm(batches, description, steps, leave=False, disable=quiet or None)):
        set_learning_rate(optimizer.param_groups, learning_rate(step, steps, peak_lr))
        optimizer.zero_grad()
        own = np.array([sample for sample in batch.tolist() if mine(sample)], np.int64)
        for start in range(0, len(own), at_once):
            with torch.enable_grad():
                (losses(step, own[start : start + at_once]).sum() / len(batch)).backward()
        if world_size > 1:
            _add_up_gradients(parameters)
        optimizer.step()


def _add_up_gradients(parameters: list[Tensor]) -> None:
    """Sums gradients over all ranks, in place; a rank that has no sample of a batch adds zeros."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
