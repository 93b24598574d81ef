"""Our safetensors writer: its files load in the library, are deterministic and are replaced atomically."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pretrain.trainer.safetensors_file import save_state_dict

METADATA = {"patch_size": "16", "arch": "vit_tiny", "method": "é", "position": "relative"}
TENSORS = {
    "odd": torch.tensor([True, False, True]),
    "number": torch.tensor(5),
    "weights": torch.arange(12.0).view(3, 4).t(),
    "half": torch.arange(5).bfloat16(),
    "empty": torch.empty(0, 3),
    "double": torch.arange(3, dtype=torch.float64),
    "bytes": torch.arange(7, dtype=torch.uint8),
}


def test_library_reads_the_written_file(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_state_dict(TENSORS, METADATA, path)
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == METADATA
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_bytes_do_not_depend_on_the_order_of_names(tmp_path: Path):
    for name, backwards in (("1", False), ("2", True)):
        tensors = {key: TENSORS[key] for key in sorted(TENSORS, reverse=backwards)}
        save_state_dict(tensors, dict(sorted(METADATA.items(), reverse=backwards)), tmp_path / name)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_existing_file_stays_intact_until_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "x.safetensors"
    save_state_dict(TENSORS, METADATA, path)
    before, write, left = path.read_bytes(), os.write, [3]

    def killed_on_third_write(descriptor: int, data: memoryview) -> int:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", killed_on_third_write)
    with pytest.raises(KeyboardInterrupt):
        save_state_dict({name: tensor + 1 for name, tensor in TENSORS.items()}, METADATA, path)
    assert path.read_bytes() == before
