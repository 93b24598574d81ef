"""Exact top-1 and top-5 over all samples of an index, on any number of ranks."""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.decode import decode
from data.index import Index
from data.reader import ShardReader
from data.transforms import center_crop


class _Crops(Dataset[tuple[Tensor, int]]):
    """The central crop and label of every `world`-th sample; every rank has the same number, filled up by label -1."""

    def __init__(self, index: Index, size: tuple[int, int], rank: int, world: int):
        self.index, self.size, self.rank, self.world = index, size, rank, world
        self.reader = ShardReader(index)

    def __len__(self) -> int:
        return -(-len(self.index) // self.world)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        sample = number * self.world + self.rank
        inside = sample < len(self.index)
        data = self.reader.read(sample if inside else 0)
        height, width = self.size
        pixels = decode(data, lambda w, h: center_crop(w, h, width / height), self.size)
        return torch.from_numpy(np.array(pixels)), int(self.index.label[sample]) if inside else -1


@torch.no_grad()
def evaluate(
    predict: Callable[[Tensor], Tensor],
    index: Index,
    *,
    size: tuple[int, int],
    batch: int,
    rank: int,
    world: int,
    workers: int,
    device: torch.device,
) -> dict[str, float]:
    """Shares of the samples whose class is the first, or among the first five, by the logits.

    Args:
        predict: (B, H, W, 3) uint8 on the device -> (B, C) logits; every rank makes the same number of calls.
        batch: images at once on each rank.
        workers: loader processes of each rank.
    """
    loader = DataLoader(_Crops(index, size, rank, world), batch, num_workers=workers, generator=torch.Generator())
    right = torch.zeros(2, dtype=torch.float64, device=device)
    for images, labels in loader:
        logits = predict(images.to(device, non_blocking=True))
        found = logits.topk(min(5, logits.shape[1])).indices == labels.to(device, non_blocking=True)[:, None]
        right += torch.stack([found[:, 0].sum(), found.any(1).sum()])
    if world > 1:
        dist.all_reduce(right)
    top1, top5 = (right / len(index)).tolist()
    return {"top1": top1, "top5": top5}
