"""Tests of other contents of pickles, which load without their packages if harmless, and of other file types."""

import argparse
import collections
import datetime
import gzip
import io
import pathlib
import pickle
import re
import sys
import types
import zipfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers import originals
from safetensors.torch import save_file
from torch import nn

from downstream.checkpoints.pickles import read_pickle
from downstream.checkpoints.weights import load_encoder

HARMLESS = {
    "a path": pathlib.PosixPath("/data/in1k"),
    "a path of another system": pathlib.PureWindowsPath("C:/data"),
    "a default": collections.defaultdict(list, {"a": [1]}),
    "a queue": collections.deque([1, 2], maxlen=3),
    "sets": [{1, 2}, frozenset({3})],
    "numbers of NumPy": [np.float64(1), np.float32(2), np.int64(3), np.bool_(True), np.uint8(4)],
    "arrays of NumPy": {"rng": ("MT19937", np.arange(4, dtype=np.uint32)), "names": np.array(["a", "b"])},
    "times": [datetime.datetime(2026, 1, 1), datetime.timedelta(hours=3)],
    "torch's own": [torch.device("cpu"), torch.Size([1, 2]), torch.float16],
    "text as bytes": b"abc",
    "ranges": [range(3), slice(1, 2), 1j],
    "a namespace": types.SimpleNamespace(lr=1e-3),
}


def saved(beside: Any, folder: Path) -> Path:
    torch.save({"model": originals.vit().state_dict(), "args": argparse.Namespace(value=beside)}, folder / "a.pth")
    return folder / "a.pth"


@pytest.mark.parametrize("case", HARMLESS)
def test_harmless_values_beside_the_weights_are_loaded(case: str, tmp_path: Path):
    path = saved(HARMLESS[case], tmp_path)
    read = vars(read_pickle(path)["args"])["value"]
    assert str(read) == str(HARMLESS[case]) or read in (HARMLESS[case], [1, 2])
    assert load_encoder(path)[1].used


def stand_in(name: str, base: type = object) -> Any:
    """Return a class with another package's full class name, and fake modules to patch into `sys.modules`."""
    module, _, attribute = name.rpartition(".")
    kind = type(attribute, (base,), {"__module__": module})
    parents = [module.rsplit(".", count)[0] for count in range(module.count(".") + 1)]
    modules = {parent: types.ModuleType(parent) for parent in parents}
    setattr(modules[module], attribute, kind)
    return kind, modules


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("mmengine.config.config.ConfigDict", dict),
        ("easydict.EasyDict", dict),
        ("omegaconf.dictconfig.DictConfig", object),
        ("omegaconf.nodes.AnyNode", object),
        ("mmengine.logging.history_buffer.HistoryBuffer", object),
    ],
)
def test_config_objects_are_loaded_without_their_packages(name: str, base: type, tmp_path: Path):
    kind, modules = stand_in(name, base)
    with patch.dict(sys.modules, modules):
        value = kind()
        if base is dict:
            value["lr"] = 1e-3
        else:
            value.content = {"lr": 1e-3}
        path = saved([value], tmp_path)
    assert load_encoder(path)[1].used


def test_paths_of_python_3_13_are_loaded(tmp_path: Path):
    originals.old_pickle({"model": originals.vit().state_dict(), "out": pathlib.PosixPath("/x")}, tmp_path / "a.pth")
    content = (tmp_path / "a.pth").read_bytes()
    assert b"cpathlib\nPosixPath" in content
    (tmp_path / "a.pth").write_bytes(content.replace(b"cpathlib\n", b"cpathlib._local\n"))
    assert str(read_pickle(tmp_path / "a.pth")["out"]) == "/x"


@pytest.mark.mm
def test_logs_of_mmengine_are_loaded(tmp_path: Path):
    from mmengine.logging import HistoryBuffer

    path = saved({"loss": HistoryBuffer([0.5], [1])}, tmp_path)
    assert load_encoder(path)[1].used


def test_getattr_is_allowed_only_for_logs_of_mmengine(tmp_path: Path):
    class Reach:
        def __reduce__(self) -> Any:
            return getattr, (argparse.Namespace, "__init__")

    with pytest.raises(ValueError, match=r"getattr.*Namespace.*could run code"):
        read_pickle(saved(Reach(), tmp_path))


def test_error_for_an_unknown_type_names_it_and_a_remedy(tmp_path: Path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(
        ValueError, match=r"holds torch\.nn\.modules\.linear\.Linear, which could run code: .*state_dict"
    ):
        load_encoder(tmp_path / "module.pth")
    kind, modules = stand_in("project.options.Options")
    with patch.dict(sys.modules, modules):
        path = saved(kind(), tmp_path)
    with pytest.raises(ValueError, match=r"holds project\.options\.Options, which could run code: .*torch\.save"):
        load_encoder(path)


def _zip(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return file.getvalue()


OTHER_KINDS = {
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    "a web page": (b"\n<!DOCTYPE html><html><head></head></html>", "a web page.*download"),
    "an error of a server": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page"),
    "Keras'": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "ONNX": (b"\x08\x07\x12\x07pytorch\x1a\x05" + bytes(100), "ONNX"),
    "JSON": (b'{\n  "model_type": "vit"}', "JSON"),
    "compressed": (gzip.compress(b"a" * 100), "compressed archive.*unpack"),
    "an image": (b"\xff\xd8\xff\xe0" + bytes(100), "an image"),
    "JAX": (_zip("params/a.npy", "params/b.npy"), r"\.npz.*JAX"),
    "a program": (_zip("m/data.pkl", "m/constants.pkl", "m/code/a.py"), "TorchScript"),
    "a zip": (_zip("weights/mae.pth"), r"zip archive \(weights/mae\.pth\).*unpack"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("case", OTHER_KINDS)
def test_files_that_are_not_checkpoints_are_recognized(case: str, suffix: str, tmp_path: Path):
    content, message = OTHER_KINDS[case]
    (tmp_path / f"file{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=f"not a checkpoint|is .*{message}") as raised:
        load_encoder(tmp_path / f"file{suffix}")
    assert re.search(message, str(raised.value))
    assert "weights_only" not in str(raised.value)


def test_safetensors_and_pickles_are_recognized_by_content(tmp_path: Path):
    state = originals.vit().state_dict()
    save_file(state, tmp_path / "a.pth")
    torch.save(state, tmp_path / "a.safetensors")
    for path in (tmp_path / "a.pth", tmp_path / "a.safetensors"):
        assert load_encoder(path)[1].used
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"model": {}}, protocol=4))
    with pytest.raises(ValueError, match="truncated, damaged or not a checkpoint"):
        load_encoder(tmp_path / "plain.pkl")
