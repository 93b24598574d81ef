"""Reads files of `torch.save`, without running any code in them.

torch's restricted unpickler makes tensors, plain values and what `_HARMLESS` lists. Everything else in a pickle, which
is where malicious ones hide their code, is refused by name and never called. Other kinds of files are recognized by
their first bytes.
"""

import argparse
import datetime
import pickle
import re
import types
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch


class _Inert:
    """Stands for an object that no weights depend on: takes what the file says about it, and does nothing."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _no_method(owner: Any, name: str) -> None:
    """Stands for `getattr`, by which mmengine's log buffers name their own methods."""
    if owner is not _Inert:
        raise pickle.UnpicklingError(f"GLOBAL getattr({owner!r}, {name!r})")


def _plain_dictionary(*_: Any) -> OrderedDict[Any, Any]:
    """Stands for a `defaultdict`, whose factory is not needed to read it."""
    return OrderedDict()


def _plain_list(*_: Any) -> list[Any]:
    """Stands for a `deque`, which is filled afterwards."""
    return []


_OMEGACONF_NODES = ["Any", "String", "Integer", "Float", "Boolean", "Bytes", "Path", "Enum", "InterpolationResult"]

# What other projects' checkpoints hold besides tensors, none of which runs code. A pair is a type and the name in the
# file that it stands for, so that the package of that name need not be installed.
_HARMLESS: list[Any] = [
    # The command line: MAE's, LoMaR's, DINO's, LUT's. Paths are mere text, on every system; Python 3.13 moved them.
    argparse.Namespace,
    types.SimpleNamespace,
    *(
        (kind, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for names, kind in (
            (("PosixPath", "PurePosixPath"), PurePosixPath),
            (("WindowsPath", "PureWindowsPath"), PureWindowsPath),
        )
        for name in names
    ),
    # Python's plain values that the unpickler does not know.
    *(set, frozenset, slice, range, complex, bytearray, dict, list, tuple, int, float, str, bool),
    *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone),
    (_plain_dictionary, "collections.defaultdict"),
    (_plain_list, "collections.deque"),
    # NumPy's numbers and arrays (DINO's learning rates), whose module had another name before NumPy 2.
    *(
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name, function in (
            ("scalar", np.float64(0).__reduce__()[0]),
            ("_reconstruct", np.zeros(0).__reduce__()[0]),
        )
    ),
    *(np.ndarray, np.dtype),
    *(type(np.dtype(kind)) for kind in "?bhilqBHILQefdFDSU"),
    # Configurations that are dictionaries by another name (yacs: SimMIM's).
    *(
        (OrderedDict, name)
        for name in (
            "yacs.config.CfgNode",
            "mmengine.config.config.ConfigDict",
            "mmcv.utils.config.ConfigDict",
            "addict.addict.Dict",
            "easydict.EasyDict",
            "pytorch_lightning.utilities.parsing.AttributeDict",
            "lightning.pytorch.utilities.parsing.AttributeDict",
            "lightning_fabric.utilities.data.AttributeDict",
        )
    ),
    # Configurations and logs that are more than dictionaries; they are left out.
    *(
        (_Inert, name)
        for name in (
            "omegaconf.dictconfig.DictConfig",
            "omegaconf.listconfig.ListConfig",
            "omegaconf.base.ContainerMetadata",
            "omegaconf.base.Metadata",
            *(f"omegaconf.nodes.{kind}Node" for kind in _OMEGACONF_NODES),
            "typing.Any",
            "mmengine.logging.history_buffer.HistoryBuffer",
        )
    ),
    (_no_method, "builtins.getattr"),
]


def read_pickle(path: Path, more: Sequence[Any] = (), *, map_location: Any = "cpu", mmap: bool = True) -> Any:
    """Reads the content of a file of `torch.save`, in the new or old format.

    Args:
        path: the file.
        more: further types that are harmless, or pairs of one and the name in the file that it stands for.
        map_location: as in `torch.load`.
        mmap: leave tensors on disk until they are used, where the format allows it.

    Raises:
        ValueError: it is cut off or not a checkpoint, or it holds something that is not known to be harmless.
    """
    allowed = {_name(kind): kind for kind in [*_HARMLESS, *more]}
    try:
        with torch.serialization.safe_globals(list(allowed.values())):
            return torch.load(
                path, map_location=map_location, weights_only=True, mmap=mmap and zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (getattr\(.+?\)|[\w.]+)|(?:unrecognized function|but got) (.+)", str(error))
        if named is None:
            raise ValueError(damaged(path, error)) from None
        raise ValueError(_refusal(path, (named[1] or named[2]).strip())) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(damaged(path, error)) from None


def is_safetensors(path: Path) -> bool:
    """Whether a file begins like safetensors, whatever its name: with the length of a JSON header, and the header."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def damaged(path: Path, error: Exception) -> str:
    """The message for a file that cannot be read: what it is instead of a checkpoint, or that it is damaged."""
    if found := _other_kind(path):
        return f"{path} is {found[0]}, not a checkpoint: {found[1]}"
    text = str(error)
    # torch's own advice, before these words, is to read the file without the restrictions.
    reason = (text.partition("WeightsUnpickler error:")[2] or text).strip().splitlines()
    return (
        f"{path} ({path.stat().st_size} bytes) is truncated, damaged or not a checkpoint: copy it again from its "
        f"source ({reason[0] if reason else 'it ends early'})"
    )


def _name(kind: Any) -> str:
    return kind[1] if isinstance(kind, tuple) else f"{kind.__module__}.{kind.__qualname__}"


def _refusal(path: Path, name: str) -> str:
    return (
        f"{path} holds {name}, which could run code: it is refused. If you trust the file and have its packages, "
        f"extract its tensors: stored = torch.load({path.name!r}, weights_only=False); torch.save({{'model': "
        f"stored['model']}}, 'tensors.pth'), with the file's own key for 'model', or stored.state_dict() of a module"
    )


# First bytes of files that people take for checkpoints, what they are, and what to do.
_KINDS = (
    (rb"version https://git-lfs", "a Git LFS pointer", "run `git lfs pull`, or download it"),
    (rb"\s*<(!doctype|html|head|\?xml)", "a web page", "download the file itself, perhaps after logging in"),
    (
        rb"\x89HDF",
        "an HDF5 file with Keras weights",
        "convert it to PyTorch, for example with transformers' from_tf=True",
    ),
    (rb"\x93NUMPY", "a NumPy array", "give a torch.save or safetensors file"),
    (rb"\x1f\x8b|\x42\x5a\x68|\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd", "a compressed archive", "unpack it first"),
    (rb"\x08[\x01-\x0f]\x12.{1,40}(pytorch|tf2onnx|onnx)", "an ONNX model", "give the weights that it was made from"),
    (rb"\s*\{\s*\"", "a JSON file", "give the weights file, or the folder that both are in"),
    (rb"(\xff\xd8\xff|\x89PNG)", "an image", "give the weights file"),
    (rb"GGUF", "a GGUF file", "give the torch.save or safetensors file that it was made from"),
)


def _other_kind(path: Path) -> tuple[str, str] | None:
    with open(path, "rb") as file:
        start = file.read(512)
    for pattern, what, advice in _KINDS:
        if re.match(pattern, start, re.IGNORECASE | re.DOTALL):
            return what, advice
    if start[257:262] == b"ustar":
        return "a tar archive", "unpack it first"
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("constants.pkl") for name in names):
        return "a TorchScript program", "give the weights that it was made from, or save its state_dict()"
    if any(name.endswith(".npy") for name in names):
        return "a NumPy .npz file, as for JAX models", "give a version for PyTorch, for example timm's"
    if any("archive_format" in name or "models/" in name for name in names):
        return "a torch.export program", "give the weights that it was made from"
    if not any(name.endswith("data.pkl") for name in names):
        return f"a zip archive ({', '.join(names[:3])}{', ...' if names[3:] else ''})", "unpack it first"
    return None
