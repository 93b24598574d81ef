"""A few hundred optimizer steps, by all ranks together and with the same weights on all of them.

Each rank computes the gradients of those samples of a batch that it has in memory. Nothing is drawn from a generator of
the process: what is random is a function of the seed here, and of the sample.
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
    """For draws of `data.draw` that depend on these numbers alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([SEED, *numbers])))


def normal(shape: tuple[int, ...], std: float, number: int) -> Tensor:
    """Initial values, fp32: normally distributed, of a generator that is the `number`-th of this module."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED + number)) * std


def draw_batches(samples: np.ndarray, batch_size: int, steps: int) -> Iterator[np.ndarray]:
    """The samples of each of `steps` batches: in a new order for every pass, and the last part of a pass is left out.

    Args:
        samples: int64 (N,), N >= 1; with fewer than `batch_size`, all of them are each batch.
        batch_size, steps: as they are on all ranks together.
    """
    batch_size = min(batch_size, len(samples))
    per_pass = len(samples) // batch_size
    for step in range(steps):
        number, index = divmod(step, per_pass)
        if index == 0:
            order = samples[permutation(generator(number), len(samples))]
        yield order[index * batch_size : (index + 1) * batch_size]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over `WARMUP` of the steps, then half a cosine down to 0, which no step has."""
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
    """AdamW on the mean of a batch's losses; the ranks' gradients are added up.

    Args:
        groups: parameter groups, in which `lr_scale` scales the rate; the same values on all ranks.
        losses: (step, (b,) samples of this rank) -> their losses (b,), of the parameters.
        batches: as of `draw_batches`.
        mine: whether a sample is in this rank's memory; every sample is in exactly one rank's.
        steps, peak_lr: how many batches, and the highest rate.
        at_once: samples of which activations are kept at the same time.
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
    """In place, over all ranks; one that has no sample of a batch adds zeros."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
