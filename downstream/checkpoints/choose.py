"""Chooses the encoder of a file that holds several: online or averaged weights, a student or a teacher."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from downstream.checkpoints.names import find_encoders

Weights = str  # `online`, `ema`, or the name of one of a file's encoders

# Names of dictionaries and modules with weights as trained, and with their moving averages.
_ONLINE = {
    *("model", "state_dict", "module", "student", "encoder", "base_encoder", "backbone", "online", "online_encoder"),
    *("encoder_q", "context_encoder", "model_state", "model_state_dict", "net", "network"),
}
_AVERAGED = {
    *("model_ema", "state_dict_ema", "ema_state_dict", "ema", "ema_model", "teacher", "target_encoder", "encoder_k"),
    *("momentum_encoder", "target", "target_network"),
}
# What authors evaluate, in files with several encoders: DINO's and I-JEPA's teachers, MoCo v3's and all others' model.
_EVALUATED = ("teacher", "target_encoder", "model", "state_dict", "module", "base_encoder", "backbone", "student")


class Choice(NamedTuple):
    """One encoder of a file.

    Attributes:
        name: as for `weights`; empty if the file has no name for it.
        tensors: the state dictionary that it is in.
        prefix: of its names there; None if no encoder was recognized.
        role: `online`, `ema`, or the name if that says neither.
    """

    name: str
    tensors: dict[str, Tensor]
    prefix: str | None
    role: str


def choose(path: Path, stored: dict[Any, Any], weights: Weights | None, marked: Weights | None) -> Choice:
    """Chooses one of the encoders that a file holds.

    Args:
        path: of the file, for messages.
        stored: its content: a state dictionary, or a dictionary of some.
        weights: as in `files.read_source`.
        marked: `online` or `ema`, if the file itself says which weights it holds.

    Raises:
        ValueError: there is no dictionary of tensors, no such encoder, or several and none was asked for.
    """
    choices = _list_choices(stored, marked)
    none = Choice("", _largest(stored), None, marked or "online")
    chosen = _pick(path, choices, weights, marked) if choices else none
    others = [str(name) for name, value in chosen.tensors.items() if not isinstance(value, Tensor)]
    if others or not chosen.tensors:
        raise ValueError(f"{path} does not hold a dictionary of tensors: {', '.join(others[:5]) or 'it is empty'}")
    return chosen


def _list_choices(stored: dict[Any, Any], marked: Weights | None) -> list[Choice]:
    sets = {str(name): value for name, value in stored.items() if isinstance(value, dict)}
    found = []
    for name, state in {**sets, "": stored}.items():
        prefixes = find_encoders(key for key in state if isinstance(key, str))
        found += [(_module_name(prefix) if prefixes.keys() - {prefix} else name, state, prefix) for prefix in prefixes]
    if len({name for name, *_ in found}) < len(found):  # the same modules in several dictionaries
        found = [(prefix.rstrip(".") or name, state, prefix) for name, state, prefix in found]
    return [Choice(name, state, prefix, _role(name) if name else marked or "online") for name, state, prefix in found]


def _role(name: str) -> str:
    parts = set(name.split("."))
    return "ema" if parts & _AVERAGED else "online" if parts & _ONLINE else name


def _module_name(prefix: str) -> str:
    """The part of a prefix that tells encoders apart: `teacher` of `module.teacher.backbone.`."""
    parts = [part for part in prefix.rstrip(".").split(".") if part not in ("module", "_orig_mod", "vit", "beit")]
    parts = [part for part in parts if not part.isdigit()]
    return ".".join(parts[:-1] if parts[1:] and parts[-1] == "backbone" else parts)


def _pick(path: Path, choices: list[Choice], weights: Weights | None, marked: Weights | None) -> Choice:
    by_name = {choice.name: choice for choice in choices}
    names = ", ".join(name or "one without a name" for name in by_name)
    found = [choice for choice in choices if weights in (None, choice.role, choice.name)]
    if len(found) == 1:
        return found[0]
    if not found and choices[0].name:
        raise ValueError(f"{path} has no {weights} weights, only {names}")
    if not found and marked:
        raise ValueError(f"{path} holds the {marked} weights, not the {weights} ones: give the other file")
    if not found:
        kind = "averaged" if weights == "ema" else weights
        raise ValueError(f"{path} has one set of weights, not marked as {kind}: do not ask for {weights}")
    for name in _EVALUATED:
        if by_name.get(name) in found:
            return by_name[name]
    raise ValueError(
        f"{path} has {len(found)} encoders: {', '.join(choice.name for choice in found)}. Choose one by its name, as "
        f"--weights {found[0].name}, start.weights={found[0].name} or target.encoder={found[0].name}"
    )


def _largest(stored: dict[str, Any]) -> dict[str, Any]:
    """The dictionary that was most likely meant as an encoder, for the message if none is recognized."""
    sets = [value for value in stored.values() if isinstance(value, dict) and value]
    sets = [value for value in sets if all(isinstance(tensor, Tensor) for tensor in value.values())]
    return max(sets, key=len, default=stored)
