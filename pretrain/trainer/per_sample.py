"""Results for each sample of an evaluation, computed by all ranks together and the same on all of them."""

import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from data.eval_loader import PADDING, EvalLoader

CHUNK = 1 << 24  # elements that are summed over the ranks at once


Compute = Callable[[Tensor, Tensor], Tensor]


def computed_batches(
    compute: Compute, loader: EvalLoader, device: torch.device, description: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This rank's results, batch by batch; every rank gets equally many batches, and the last may have no samples.

    Args:
        compute: ((B, H, W, C) images on the device, (B,) sample numbers) -> (B, ...). Padding (PADDING) and
            images that cannot be decoded are black images.
        loader: the samples.
        device: where to compute.
        description: label of the progress bar.

    Yields:
        Rows (b,) in `loader.indices`, without padding, consecutive ones if the loader has no subset; their results
        (b, ...) on the CPU; and bool (b,), whether they can be decoded: results of the others mean nothing.

    Raises:
        ValueError: there are no samples; and as `EvalLoader.batches`.
    """
    if not len(loader):
        raise ValueError(f"{description}: there are no samples")
    indices = torch.from_numpy(loader.indices)
    quiet = loader.rank != 0 or not sys.stderr.isatty()
    for batch in tqdm(loader.batches(), description, len(loader), unit="batch", leave=False, disable=quiet):
        with torch.no_grad():
            values = compute(batch.images.to(device, non_blocking=True), batch.samples).cpu()
        real = batch.samples != PADDING
        yield torch.searchsorted(indices, batch.samples[real]), values[real], batch.readable[real]


def compute_per_sample(
    compute: Compute, loader: EvalLoader, device: torch.device, description: str
) -> tuple[Tensor, Tensor]:
    """The results of all samples; called by all ranks together.

    Each rank calls `compute` equally often, on batches of the same shape. Each sample is computed by one rank and the
    others add zeros, so the sum over ranks is exact.

    Args:
        compute: as in `computed_batches`, -> (B, K).
        loader, device, description: as in `computed_batches`.

    Returns:
        (N, K) on the CPU, row i for sample `loader.indices[i]`, zeros if it cannot be decoded; and bool (N,), whether
        it can be.

    Raises:
        ValueError: as `computed_batches`.
    """
    count = len(loader.indices)
    visits, readable = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    results: Tensor | None = None
    for rows, values, can_be_decoded in computed_batches(compute, loader, device, description):
        if results is None:
            results = torch.zeros((count, values.shape[1]), dtype=values.dtype)
        visits[rows] += 1
        readable[rows] += can_be_decoded.long()
        results[rows] = values * can_be_decoded[:, None].to(values.dtype)
    assert results is not None
    for tensor in (results, visits, readable):
        sum_over_ranks(tensor, loader.world_size, device)
    assert (visits == 1).all(), "each sample belongs to one rank"
    return results, readable.bool()


def sum_over_ranks(tensor: Tensor, world: int, device: torch.device) -> None:
    """Sums in place, a chunk at a time: the whole tensor may be larger than the device's memory."""
    if world == 1:
        return
    for chunk in tensor.view(-1).split(CHUNK):
        on_device = chunk.to(device)
        dist.all_reduce(on_device)
        chunk.copy_(on_device)


def unreadable_keys(loader: EvalLoader, readable: Tensor) -> list[str]:
    """The keys of the samples that could not be decoded."""
    return [loader.samples.keys[number] for number in loader.indices[~np.asarray(readable)].tolist()]
