"""Tensors out of checkpoint files, without running anything that a file says.

Pickles are read by torch's restricted unpickler: tensors, plain values and what `_HARMLESS` lists. Everything else in
a pickle, which is where malicious ones hide their code, is refused by name and never called.
"""

import argparse
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.models.encoder_spec import EncoderSpec
from pretrain.trainer.checkpoint_layout import (
    ANY_MODEL_STATES,
    EMA_FILE,
    MANIFEST,
    MODEL_STATES,
    STAGE3_MODEL_STATES,
    STAGE3_OPTIMIZER_STATES,
    deepspeed_types,
    latest_checkpoint,
    read_state,
)
from pretrain.trainer.run_folder import RunFolder

Weights = Literal["online", "ema"]

# What checkpoints of others hold besides tensors, none of which runs code: the command line (MAE, LoMaR, DINO, LUT);
# NumPy's numbers (DINO's learning rates), whose module had another name before NumPy 2; a configuration that is a
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

# The keys of state dictionaries in checkpoints. DINO trains its student; its teacher is a moving average of it.
_ONLINE = ("model", "state_dict", "module", "student")
_AVERAGED = ("model_ema", "state_dict_ema", "teacher")


@dataclass(frozen=True)
class Source:
    """One set of weights, by the names in its file.

    Attributes:
        path: the file, or the folder of a checkpoint.
        weights: which set it is; `online` also where a file does not say.
        metadata: of the file, as it is; `weights`, and what `ClassifierSpec` adds in a classifier's file.
        spec: of the encoder, as our own files and checkpoints record it.
        ours: whether it is a checkpoint of our training, whose other modules are known not to be the encoder's.
    """

    path: Path
    tensors: dict[str, Tensor]
    weights: Weights = "online"
    metadata: Mapping[str, str] = field(default_factory=dict)
    spec: EncoderSpec | None = None
    ours: bool = False


def read_source(path: Path | str, weights: Weights | None = None) -> Source:
    """Reads a run's folder, one of its checkpoints (of any ZeRO stage), a safetensors file or a torch pickle.

    Args:
        path: the file or folder.
        weights: `online` as trained, or `ema`, their moving average. None: those that a method's authors evaluate,
            DINO's teacher, else the online weights.

    Raises:
        ValueError: the path does not exist, is damaged, could run code, or lacks the requested weights.
    """
    path = Path(path)
    if path.name.endswith("_states.pt"):  # one of DeepSpeed's files is not enough without the others
        path = path.parent
    if path.is_dir():
        return _read_folder(path, weights)
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}: neither a file nor a folder")
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
        stored: Weights = "ema" if metadata.get("weights") == "ema" or path.stem.endswith("_ema") else "online"
        if weights not in (None, stored):
            raise ValueError(f"{path} holds the {stored} weights, not the {weights} ones: give the other file")
        return Source(path, tensors, stored, metadata, _read_spec(path, metadata))
    return _choose(path, read_pickle(path), weights)


def _read_folder(folder: Path, weights: Weights | None) -> Source:
    run = RunFolder(folder)
    if any(folder.glob(ANY_MODEL_STATES)):
        return _read_checkpoint(folder, weights)
    if not run.config.is_file():
        raise ValueError(f"{folder} is neither a run's folder (no {run.config.name}) nor one of its checkpoints")
    encoder, classifier = (run.encoder_ema, run.model_ema) if weights == "ema" else (run.encoder, run.model)
    for file in (encoder, classifier):
        if file.is_file():
            return read_source(file, weights)
    latest = latest_checkpoint(run.checkpoints)
    if latest is None:
        raise ValueError(f"{folder} has no {encoder.name} and no checkpoint yet")
    return _read_checkpoint(latest, weights)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(_damaged(path, error)) from None


def read_pickle(path: Path, more: Sequence[Any] = ()) -> Any:
    """The content of a file of `torch.save`, new or old format, on the CPU; tensors stay on disk until they are used.

    Args:
        path: the file.
        more: further types that are harmless.

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


def _read_spec(path: Path, metadata: Mapping[str, str]) -> EncoderSpec | None:
    try:
        return EncoderSpec.from_metadata(metadata)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has metadata that this project did not write ({error})") from None


def _damaged(path: Path, error: Exception) -> str:
    text = str(error)
    # torch's own advice, before these words, is to read the file without the restrictions.
    reason = (text.partition("WeightsUnpickler error:")[2] or text).strip().splitlines()
    return (
        f"{path} ({path.stat().st_size} bytes) is cut off, damaged or not a checkpoint: copy it again from its origin "
        f"({reason[0] if reason else 'it ends early'})"
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
            raise ValueError(f"{path} holds one set of weights, which is not marked as averaged: do not ask for ema")
        return Source(path, _tensors(path, stored))
    chosen: Weights = weights or ("ema" if names["ema"] == "teacher" or not names["online"] else "online")
    name = names[chosen]
    if name is None:
        raise ValueError(f"{path} has no {chosen} weights, only {', '.join(n for n in names.values() if n)}")
    meta = stored.get("meta")
    metadata = meta if isinstance(meta, dict) else {}
    return Source(path, _tensors(path, stored[name]), chosen, metadata, _read_spec(path, metadata))


def _tensors(path: Path, state: dict[str, Any]) -> dict[str, Tensor]:
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others or not state:
        raise ValueError(f"{path} holds no dictionary of tensors: {', '.join(others[:5]) or 'it is empty'}")
    return dict(state)


def _read_checkpoint(folder: Path, weights: Weights | None) -> Source:
    """The method's fp32 weights, or their moving average, out of one of our checkpoints, and the spec of its run."""
    config = RunFolder(folder.parent.parent).config
    epochs = yaml.safe_load(config.read_text())["train"]["epochs"] if config.is_file() else None
    try:
        signature = read_state(folder).resume_signature
        spec = None if "head" in signature else EncoderSpec.from_signature(signature, epochs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} has no readable {MANIFEST} ({error}): is it a checkpoint of this project?"
        ) from None
    if spec is None:
        raise ValueError(
            f"{folder} is a checkpoint of a classifier, not of a pretraining: give the encoder that it started from "
            f"({signature['start']['checkpoint'] or 'none'})"
        )
    if weights == "ema":
        average = folder / EMA_FILE
        if not average.is_file():
            raise ValueError(f"{folder} has no averaged weights: this training kept none")
        return Source(folder, _read_safetensors(average)[0], "ema", spec=spec, ours=True)
    complete = folder / MODEL_STATES
    tensors = _read_states(complete)["module"] if complete.is_file() else _gather_stage3(folder)
    return Source(folder, tensors, spec=spec, ours=True)


def _read_states(path: Path) -> Any:
    return read_pickle(path, deepspeed_types())


def _gather_stage3(folder: Path) -> dict[str, Tensor]:
    """Complete parameters from the ranks' partitions.

    A rank keeps its partitions of all parameters in one flat fp32 vector (in several, if it is long), in the order of
    `param_shapes`. Every parameter is cut into as many equal partitions as there are ranks, the last one padded.
    """
    ranks = sorted(folder.glob(STAGE3_OPTIMIZER_STATES), key=_rank)
    first = folder / STAGE3_MODEL_STATES
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
            padded = torch.cat([flat[at : at + length] for flat in flats])
            tensors[name] = padded[: shape.numel()].view(shape)
            at += length
    if at > len(flats[0]):
        raise ValueError(f"{folder}: its parameters need {at} numbers per rank, there are {len(flats[0])}")
    return tensors


def _rank(path: Path) -> int:
    found = re.search(r"rank_(\d+)_", path.name)
    assert found, path
    return int(found[1])
