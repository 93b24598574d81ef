"""Copies tensors to host memory, so that training can go on while they are written."""

import copy
from typing import Any

import torch
from torch import Tensor, UntypedStorage


class HostCopies:
    """Copies trees of tensors; the memory is kept and reused, since new pages cost more than the copy.

    From a GPU, memory is pinned: all copies are queued at once, run at the bus's full speed, and `wait` waits for them.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, bool], list[UntypedStorage]] = {}
        self._used: list[tuple[tuple[int, bool], UntypedStorage]] = []
        self._copied: dict[int, tuple[UntypedStorage, UntypedStorage]] = {}  # by storage, which it keeps alive

    def copy(self, tree: Any) -> Any:
        """A copy of the tree with the current values of its tensors; everything else in it is copied as well.

        Tensors that share memory still do, so that a file of them is no larger than one of the originals.
        """
        if isinstance(tree, Tensor):
            return self._tensor(tree.detach())
        if isinstance(tree, dict):
            copied = copy.copy(tree)  # an ordered dictionary's own attributes, too
            for key, value in tree.items():
                copied[key] = self.copy(value)
            return copied
        if type(tree) in (list, tuple):
            return type(tree)(self.copy(value) for value in tree)
        return copy.deepcopy(tree)

    def wait(self) -> None:
        """Waits until all copies are complete; then the originals may change."""
        devices = {source.device for source, _ in self._copied.values() if source.device.type == "cuda"}
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        self._copied.clear()

    def release(self) -> None:
        """Frees the memory of all copies for reuse; nobody may read them any more."""
        for kind, memory in self._used:
            self._free.setdefault(kind, []).append(memory)
        self._used.clear()

    def _tensor(self, tensor: Tensor) -> Tensor:
        source = tensor.untyped_storage()
        key = source._cdata
        if key not in self._copied:
            self._copied[key] = (source, self._storage(source))
        copied = torch.empty(0, dtype=tensor.dtype)
        return copied.set_(self._copied[key][1], tensor.storage_offset(), tensor.shape, tensor.stride())

    def _storage(self, source: UntypedStorage) -> UntypedStorage:
        kind = (source.nbytes(), source.device.type == "cuda")
        free = self._free.get(kind)
        memory = free.pop() if free else torch.empty(kind[0], dtype=torch.uint8, pin_memory=kind[1]).untyped_storage()
        self._used.append((kind, memory))
        _bytes(memory).copy_(_bytes(source), non_blocking=True)
        return memory


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
