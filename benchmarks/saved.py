"""The memory that a forward pass keeps for the backward pass: the same on every device, unlike an allocator's peak."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def saved_storages(model: nn.Module) -> Iterator[dict[int, int]]:
    """Fills a dictionary of storage -> bytes for what autograd saves meanwhile, without the model's weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        yield storages
