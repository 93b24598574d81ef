"""The memory that a forward pass keeps for the backward pass: the same on every device, unlike an allocator's peak."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


@contextmanager
def saved_storages(model: nn.Module) -> Iterator[dict[StorageWeakRef, int]]:
    """Fills a dictionary of storage -> bytes for what autograd saves meanwhile, without the model's weights."""
    weights = {StorageWeakRef(p.untyped_storage()) for p in model.parameters()}
    storages: dict[StorageWeakRef, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)  # and not the address, which tensors without memory do not have
        if reference not in weights:
            storages[reference] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        yield storages
