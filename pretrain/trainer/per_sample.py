"""Results for each sample of an evaluation, computed by all ranks together and the same on all of them."""

import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from data.eval_loader import PADDING, EvalLoader

CHUNK = 1 << 24  # elements that are summed over the ranks at once


@torch.no_grad()
def compute_per_sample(
    compute: Callable[[Tensor, Tensor], Tensor], loader: EvalLoader, device: torch.device, description: str
) -> tuple[Tensor, Tensor]:
    """Called by all ranks together; each calls `compute` equally often, on batches of the same shape.

    Each sample is computed by one rank, and the others add zeros: the sum over ranks is exact.

    Args:
        compute: ((B, H, W, 3) uint8 images on the device, (B,) sample numbers) -> (B, K). Padding (PADDING) and images
            that cannot be decoded are black images, whose results are dropped.
        loader: the samples.
        device: where to compute.
        description: label of the progress bar.

    Returns:
        (N, K) on the CPU, row i for sample `loader.indices[i]`, zeros if it cannot be decoded; and bool (N,), whether
        it can be.

    Raises:
        ValueError: no samples; and as `EvalLoader.batches`.
    """
    if not len(loader):
        raise ValueError(f"{description}: there are no samples")
    indices = torch.from_numpy(loader.indices)
    visits, readable = torch.zeros(len(indices), dtype=torch.int64), torch.zeros(len(indices), dtype=torch.int64)
    results: Tensor | None = None
    quiet = loader.rank != 0 or not sys.stderr.isatty()
    for batch in tqdm(loader.batches(), description, len(loader), unit="batch", leave=False, disable=quiet):
        values = compute(batch.images.to(device, non_blocking=True), batch.samples).cpu()
        if results is None:
            results = torch.zeros((len(indices), values.shape[1]), dtype=values.dtype)
        real = batch.samples != PADDING
        row = torch.searchsorted(indices, batch.samples[real])
        visits[row] += 1
        readable[row] += batch.readable[real].long()
        results[row] = values[real] * batch.readable[real, None].to(values.dtype)
    assert results is not None
    for tensor in (results, visits, readable):
        _sum_over_ranks(tensor, loader.world_size, device)
    assert (visits == 1).all(), "each sample belongs to one rank"
    return results, readable.bool()


def _sum_over_ranks(tensor: Tensor, world: int, device: torch.device) -> None:
    """In place, a chunk at a time: all of it may be larger than the device's memory."""
    if world == 1:
        return
    for chunk in tensor.view(-1).split(CHUNK):
        on_device = chunk.to(device)
        dist.all_reduce(on_device)
        chunk.copy_(on_device)


def unreadable_keys(loader: EvalLoader, readable: Tensor) -> list[str]:
    """The keys of the samples that could not be decoded."""
    return [loader.samples.keys[number] for number in loader.indices[~np.asarray(readable)].tolist()]
