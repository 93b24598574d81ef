"""Writes safetensors files whose bytes depend only on what is in them.

The library's own function orders the metadata differently in each process, and holds the file in memory twice.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pretrain.trainer.durable import DurableFile, rename

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class _Writable(Protocol):
    def write(self, data: Any, /) -> int:
        """Appends a buffer of bytes."""


def write_safetensors(
    file: _Writable, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors on the CPU, those with the largest elements first, as the format's alignment requires."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name in names:
        tensor = tensors[name]
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        if tensors[name].numel():
            file.write(tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy())


def save_state_dict(state: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Writes a safetensors file, which has another name until it is complete and synced."""
    unfinished = path.with_name(f"unfinished-{path.name}")
    with DurableFile(unfinished) as file:
        write_safetensors(file, state, metadata)
    rename(unfinished, path)
