"""Tensors out of checkpoint files, without running anything that a file says.

Pickles are read by torch's restricted unpickler: tensors, plain values and what `_HARMLESS` lists. Everything else in
a pickle, which is where malicious ones hide their code, is refused by name and never called.
"""

import argparse
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.trainer.checkpoint_layout import EMA_FILE
from pretrain.trainer.run_folder import RunFolder

Weights = Literal["online", "ema"]

# What checkpoints of others hold beside tensors, none of which runs code: the command line (MAE, LoMaR, DINO, LUT);
# NumPy's numbers (DINO's learning rates), whose module was called otherwise before NumPy 2; a configuration that is a
# dictionary by another name (SimMIM's; read as one, so that its package need not be installed).
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
_HARMLESS: list[Any] = [
    argparse.Namespace,
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)),
    (OrderedDict, "yacs.config.CfgNode"),
]

# Where checkpoints keep their state dictionaries. DINO's student is what is trained, its teacher an average of it.
_ONLINE = ("model", "state_dict", "module", "student")
_AVERAGED = ("model_ema", "state_dict_ema", "teacher")


@dataclass(frozen=True)
class Source:
    """One set of weights, by the names of its file.

    Attributes:
        path: the file, or the folder of a checkpoint.
        weights: which set it is; `online` also where a file does not say.
        facts: of our own files: `arch`, `patch`, `size` (HxW), `position` and, where known, `method` and `epochs`.
        ours: whether it is a checkpoint of our training, whose other modules are known not to be the encoder's.
    """

    path: Path
    tensors: dict[str, Tensor]
    weights: Weights = "online"
    facts: dict[str, str] = field(default_factory=dict)
    ours: bool = False


def read_source(path: Path | str, weights: Weights | None = None) -> Source:
    """Reads a run's folder, one of its checkpoints (of any ZeRO stage), a safetensors file or a pickle of torch.

    Args:
        path: the file or folder.
        weights: `online` as trained, or `ema`, their moving average. Without it what a method's authors evaluate:
            DINO's teacher, else the online weights.

    Raises:
        ValueError: there is no such thing, it is damaged, it wants to run code, or it lacks the weights asked for.
    """
    path = Path(path)
    if path.name.endswith("_states.pt"):  # one file of DeepSpeed's says little without the others
        path = path.parent
    if path.is_dir():
        return _read_folder(path, weights)
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}: neither a file nor a folder")
    if path.suffix == ".safetensors":
        tensors, facts = _read_safetensors(path)
        stored: Weights = "ema" if facts.get("weights") == "ema" or path.stem.endswith("_ema") else "online"
        if weights not in (None, stored):
            raise ValueError(f"{path} holds the {stored} weights, not the {weights} ones: name the other file")
        return Source(path, tensors, stored, facts)
    return _choose(path, read_pickle(path), weights)


def _read_folder(folder: Path, weights: Weights | None) -> Source:
    run = RunFolder(folder)
    if any(folder.glob("*_model_states.pt")):
        return _read_checkpoint(folder, weights)
    if not run.config.is_file():
        raise ValueError(f"{folder} is neither a run's folder (no {run.config.name}) nor one of its checkpoints")
    encoder, classifier = (run.encoder_ema, run.model_ema) if weights == "ema" else (run.encoder, run.model)
    for file in (encoder, classifier):
        if file.is_file():
            return read_source(file, weights)
    latest = run.checkpoints / "latest"
    if not latest.is_file():
        raise ValueError(f"{folder} has no {encoder.name} and no checkpoint yet")
    return _read_checkpoint(run.checkpoints / latest.read_text().strip(), weights)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, _facts(file.metadata())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(_damaged(path, error)) from None


def read_pickle(path: Path, more: Sequence[Any] = ()) -> Any:
    """What a file of `torch.save` holds, new or old format, on the CPU; large tensors stay on disk until they are used.

    Args:
        path: the file.
        more: classes that are harmless too.

    Raises:
        ValueError: it is cut off or no checkpoint, or it holds something that is not known to be harmless.
    """
    try:
        with torch.serialization.safe_globals([*_HARMLESS, *more]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)|(?:unrecognized function|but got) (.+)", str(error))
        if named is None:
            raise ValueError(_damaged(path, error)) from None
        raise ValueError(
            f"{path} holds {(named[1] or named[2]).strip()}, which could run code: it is refused. "
            f"Save its tensors alone, on a machine that trusts it"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(_damaged(path, error)) from None


def _facts(metadata: Any) -> dict[str, str]:
    """What our own files say of themselves; that of others has other keys, and is left aside."""
    ours = isinstance(metadata, dict) and metadata.keys() >= {"arch", "patch", "size", "position"}
    return dict(metadata) if ours else {}


def _damaged(path: Path, error: Exception) -> str:
    text = str(error)
    # torch's own advice, before these words, is to read the file without the restrictions.
    said = (text.partition("WeightsUnpickler error:")[2] or text).strip().splitlines()
    return (
        f"{path} ({path.stat().st_size} bytes) is cut off, damaged or no checkpoint: copy it again from where it came "
        f"({said[0] if said else 'it ends early'})"
    )


def _choose(path: Path, stored: Any, weights: Weights | None) -> Source:
    """One of the sets of weights that a pickle holds."""
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds a {type(stored).__name__}, not a dictionary of tensors")
    names = {
        "online": next((name for name in _ONLINE if isinstance(stored.get(name), dict)), None),
        "ema": next((name for name in _AVERAGED if isinstance(stored.get(name), dict)), None),
    }
    if not any(names.values()):
        if weights == "ema":
            raise ValueError(f"{path} holds one set of weights and does not say that it is averaged: leave weights out")
        return Source(path, _tensors(path, stored))
    chosen: Weights = weights or ("ema" if names["ema"] == "teacher" or not names["online"] else "online")
    name = names[chosen]
    if name is None:
        raise ValueError(f"{path} has no {chosen} weights, only {', '.join(n for n in names.values() if n)}")
    return Source(path, _tensors(path, stored[name]), chosen, _facts(stored.get("meta")))


def _tensors(path: Path, state: dict[str, Any]) -> dict[str, Tensor]:
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others or not state:
        raise ValueError(f"{path} holds no dictionary of tensors: {', '.join(others[:5]) or 'it is empty'}")
    return dict(state)


def _read_checkpoint(folder: Path, weights: Weights | None) -> Source:
    """The method's fp32 weights out of one of our checkpoints, or their average, and what its manifest says of them."""
    try:
        trained = json.loads((folder / "manifest.json").read_text())["state"]["trained_function"]
        model, (height, width) = trained["model"], _pair(trained["data"]["size"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder} has no readable manifest.json ({error}): is it a checkpoint of this project?"
        ) from None
    if "method" not in trained:
        raise ValueError(
            f"{folder} is of a classifier, not of a pretraining: give the encoder that it started from "
            f"({trained['start']['checkpoint'] or 'none'})"
        )
    facts = {
        **{key: str(model[key]) for key in ("arch", "patch", "position")},
        "size": f"{height}x{width}",
        "method": trained["method"]["name"],
    }
    config = RunFolder(folder.parent.parent).config
    if config.is_file():
        facts["epochs"] = str(yaml.safe_load(config.read_text())["train"]["epochs"])
    if weights == "ema":
        average = folder / EMA_FILE
        if not average.is_file():
            raise ValueError(f"{folder} has no averaged weights: this training kept none")
        return Source(folder, _read_safetensors(average)[0], "ema", facts, ours=True)
    whole = folder / "mp_rank_00_model_states.pt"
    tensors = _read_states(whole)["module"] if whole.is_file() else _gather_stage3(folder)
    return Source(folder, tensors, facts=facts, ours=True)


def _pair(size: int | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _read_states(path: Path) -> Any:
    # DeepSpeed looks for its accelerator as soon as it is imported: not before it is needed.
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return read_pickle(path, [ZeroStageEnum, LossScaler, fragment_address])


def _gather_stage3(folder: Path) -> dict[str, Tensor]:
    """Whole parameters from the ranks' parts.

    A rank keeps its parts of all parameters in one flat fp32 vector (in several, if it is long), in the order of
    `param_shapes`. Every parameter is cut into as many equal parts as there are ranks, the last one padded.
    """
    ranks = sorted(folder.glob("zero_pp_rank_*_optim_states.pt"), key=_rank)
    first = folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    if not ranks or not first.is_file():
        raise ValueError(f"{folder} lacks files of the checkpoint: copy all of it")
    parts = [_read_states(path)["optimizer_state_dict"] for path in ranks]
    if parts[0]["partition_count"] != len(ranks):
        raise ValueError(f"{folder} has {len(ranks)} of {parts[0]['partition_count']} ranks' files: copy all of it")
    flats = [torch.cat([group.flatten() for group in part["fp32_flat_groups"]]) for part in parts]
    states = _read_states(first)
    tensors = {name: states["module"][name] for name in states["buffer_names"] if name in states["module"]}
    at = 0
    for shapes in states["param_shapes"]:
        for name, shape in shapes.items():
            length = -(-shape.numel() // len(ranks))
            whole = torch.cat([flat[at : at + length] for flat in flats])
            tensors[name] = whole[: shape.numel()].view(shape)
            at += length
    if at > len(flats[0]):
        raise ValueError(f"{folder}: its parameters need {at} numbers of a rank, there are {len(flats[0])}")
    return tensors


def _rank(path: Path) -> int:
    found = re.search(r"rank_(\d+)_", path.name)
    assert found, path
    return int(found[1])
