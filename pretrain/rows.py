"""A row of numbers for each sample of a pass, computed by all ranks together and the same on all of them."""

import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from data.once import PADDING, Once

AT_ONCE = 1 << 24  # numbers that are summed over the ranks in one piece


@torch.no_grad()
def compute_rows(
    compute: Callable[[Tensor, Tensor], Tensor], once: Once, device: torch.device, description: str
) -> tuple[Tensor, Tensor]:
    """Called by all ranks together; each calls `compute` equally often, on batches of the same shape.

    Every sample belongs to one rank, and the others add zeros: the sum over ranks changes no bit.

    Args:
        compute: ((B, H, W, 3) uint8 images on the device, (B,) sample numbers) -> (B, K). Rows of padding (PADDING)
            and of images that cannot be decoded are computed of black images, and thrown away.
        once: the pass.
        device: where to compute.
        description: in front of the progress bar.

    Returns:
        (N, K) on the CPU, row i for sample `once.numbers[i]`, zeros where that cannot be decoded; and bool (N,),
        whether it can.

    Raises:
        ValueError: no samples; and as `Once.batches`.
    """
    if not len(once):
        raise ValueError(f"{description}: there are no samples")
    numbers = torch.from_numpy(once.numbers)
    seen, readable = torch.zeros(len(numbers), dtype=torch.int64), torch.zeros(len(numbers), dtype=torch.int64)
    rows: Tensor | None = None
    quiet = once.rank != 0 or not sys.stderr.isatty()
    for batch in tqdm(once.batches(), description, len(once), unit="batch", leave=False, disable=quiet):
        values = compute(batch.images.to(device, non_blocking=True), batch.samples).cpu()
        if rows is None:
            rows = torch.zeros((len(numbers), values.shape[1]), dtype=values.dtype)
        real = batch.samples != PADDING
        place = torch.searchsorted(numbers, batch.samples[real])
        seen[place] += 1
        readable[place] += batch.readable[real].long()
        rows[place] = values[real] * batch.readable[real, None].to(values.dtype)
    assert rows is not None
    for tensor in (rows, seen, readable):
        _sum_over_ranks(tensor, once.world, device)
    assert (seen == 1).all(), "every sample once"
    return rows, readable.bool()


def _sum_over_ranks(tensor: Tensor, world: int, device: torch.device) -> None:
    """In place, a piece at a time: all of it may be larger than the device's memory."""
    if world == 1:
        return
    for piece in tensor.view(-1).split(AT_ONCE):
        there = piece.to(device)
        dist.all_reduce(there)
        piece.copy_(there)


def unreadable_keys(once: Once, readable: Tensor) -> list[str]:
    """The keys of the samples that could not be decoded."""
    return [once.samples.keys[number] for number in once.numbers[~np.asarray(readable)].tolist()]
