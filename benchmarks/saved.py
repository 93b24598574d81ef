"""The memory that a forward pass keeps for the backward pass; it does not depend on an allocator, unlike the peak."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


@contextmanager
def saved_storages(model: nn.Module) -> Iterator[dict[StorageWeakRef, int]]:
    """Fills a dictionary of storage -> bytes with what autograd saves in the context, without the model's weights."""
    weights = {StorageWeakRef(p.untyped_storage()) for p in model.parameters()}
    storages: dict[StorageWeakRef, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)  # not the address, because tensors without memory have none
        if reference not in weights:
            storages[reference] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        yield storages
