"""Reads tensors from checkpoint files, without running any code in them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from downstream.checkpoints.choose import Weights, choose
from downstream.checkpoints.hub import CONFIG, HubRecord, is_weights, read_record, weight_files
from downstream.checkpoints.pickles import damaged, is_safetensors, read_pickle
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.trainer.checkpoint_layout import (
    ANY_MODEL_STATES,
    EMA_FILE,
    MANIFEST,
    MODEL_STATES,
    deepspeed_types,
    latest_checkpoint,
    read_state,
)
from pretrain.trainer.run_folder import RunFolder
from pretrain.trainer.stored_state import StoredState


@dataclass(frozen=True)
class Source:
    """One set of weights, by the names in its file.

    Attributes:
        path: the file, or the folder of a checkpoint or of the Hugging Face hub.
        tensors: a whole state dictionary.
        weights: which set it is: `online` (also if the file does not say), `ema`, or an encoder's name in the file.
        prefix: of the encoder's names; None if it is still to be found.
        metadata: of the file, as stored: `weights`, and in a classifier's file what `ClassifierSpec` adds.
        spec: of the encoder, as our own files and checkpoints record it.
        ours: whether it is a checkpoint of our training, whose other modules are known not to be the encoder's.
        hub: what a folder of the Hugging Face hub says.
        beside: what a pickle holds besides the weights, by name.
    """

    path: Path
    tensors: dict[str, Tensor]
    weights: Weights = "online"
    prefix: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    spec: EncoderSpec | None = None
    ours: bool = False
    hub: HubRecord | None = None
    beside: Mapping[str, Any] = field(default_factory=dict)


def read_source(path: Path | str, weights: Weights | None = None) -> Source:
    """Reads a run's folder, one of its checkpoints (of any ZeRO stage), a safetensors file or a torch pickle.

    Args:
        path: the file or folder; also a folder of the Hugging Face hub, or a file in one.
        weights: `online` (as trained), `ema` (their moving average), or the name of one of the encoders in the file.
            None: those that a method's authors evaluate: DINO's and I-JEPA's teacher, else the online weights.

    Raises:
        ValueError: the path does not exist, is damaged, could run code, or lacks the requested weights.
    """
    path = Path(path)
    if path.name.endswith("_states.pt"):  # one of DeepSpeed's files is not enough without the others
        path = path.parent
    if path.is_dir():
        return _read_folder(path, weights)
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}: neither a file nor a folder{_advice(str(path))}")
    hub = read_record(path.parent) if is_weights(path) else None
    if hub is not None and (path.suffix == ".json" or "-of-" in path.name):  # one of several parts, or their index
        path = path.parent
    return _read_files(path, weights, hub)


def _advice(name: str) -> str:
    """What to do if a path names something that is elsewhere."""
    if re.match(r"https?:", name):
        return "; download it first"
    if re.fullmatch(r"[\w-]+/[\w-]+[\w.-]*", name) and not Path(name).parent.is_dir():
        return f"; if it is on the Hugging Face hub, download it first: hf download {name} --local-dir FOLDER"
    return ""


def _read_files(path: Path, weights: Weights | None, hub: HubRecord | None) -> Source:
    """Reads one of the encoders of a file, or of a folder of the hub, whose files are merged."""
    stored: dict[Any, Any] = {}
    metadata: dict[str, str] = {}
    marked: Weights | None = None
    for part in [path] if path.is_file() else weight_files(path):
        content, more, marked = _read_content(part)
        stored |= content
        metadata |= more
    choice = choose(path, stored, weights, marked)
    beside = {str(name): value for name, value in stored.items() if not isinstance(value, Tensor)}
    spec = _read_spec(path, metadata)
    return Source(path, choice.tensors, choice.role, choice.prefix, metadata, spec, hub=hub, beside=beside)


def _read_content(path: Path) -> tuple[dict[Any, Any], dict[str, str], Weights | None]:
    """A file's dictionary, its metadata, and which weights it is marked to hold, if its format has a mark."""
    if is_safetensors(path):
        tensors, metadata = _read_safetensors(path)
        averaged = metadata.get("weights") == "ema" or path.stem.endswith("_ema")
        return dict(tensors), metadata, "ema" if averaged else "online"
    stored = read_pickle(path)
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds a {type(stored).__name__}, not a dictionary of tensors")
    meta = stored.get("meta")
    return stored, dict(meta) if isinstance(meta, dict) else {}, None


def _read_folder(folder: Path, weights: Weights | None) -> Source:
    run = RunFolder(folder)
    if any(folder.glob(ANY_MODEL_STATES)):
        return _read_checkpoint(folder, weights)
    if hub := read_record(folder):
        return _read_files(folder, weights, hub)
    if not run.config.is_file():
        raise ValueError(
            f"{folder} is neither a run's folder (no {run.config.name}) nor one of its checkpoints, nor a folder of "
            f"the Hugging Face hub (no {CONFIG})"
        )
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
        raise ValueError(damaged(path, error)) from None


def _read_spec(path: Path, metadata: Mapping[str, str]) -> EncoderSpec | None:
    try:
        return EncoderSpec.from_metadata(metadata)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has metadata that this project did not write ({error})") from None


def _read_checkpoint(folder: Path, weights: Weights | None) -> Source:
    """Reads the method's fp32 weights, or their moving average, from one of our checkpoints, with its run's spec."""
    if weights not in (None, "online", "ema"):
        raise ValueError(f"{folder} is a checkpoint of a run, which has only online and ema weights, not {weights}")
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
            f"{folder} is a checkpoint of a classifier, not of pretraining: give the encoder that it started from "
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
    """Gathers complete parameters from the ranks' partitions."""
    stored = StoredState(folder, load=_read_states)
    return stored.buffers | {name: stored.weight(name) for name in stored.shapes}
