"""AdamW's moments, out of a checkpoint of any ZeRO stage and number of ranks, into an engine of any other.

A run resumes by DeepSpeed's own files; this is for a new run that starts from another run's weights.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.trainer.checkpoint_layout import (
    MODEL_STATES,
    OPTIMIZER_STATES,
    STAGE3_MODEL_STATES,
    load_deepspeed_file,
    read_state,
)

_KINDS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Moments:
    """Of some parameters.

    Attributes:
        updates: of the weights that they are the average of; Adam's correction of its bias depends on it.
        averages: by `exp_avg` and `exp_avg_sq`, parameter -> its first or second moment, of its shape, in fp32.
    """

    updates: int
    averages: dict[str, dict[str, Tensor]]

    def renamed(self, taken: Mapping[str, str]) -> "Moments":
        """Those of some parameters under other names.

        Args:
            taken: new name -> the one here; names that are not here are left out, such as those of buffers.
        """
        averages = {
            kind: {new: average[old] for new, old in taken.items() if old in average}
            for kind, average in self.averages.items()
        }
        return Moments(self.updates, averages)


def read_moments(checkpoint: Path) -> Moments:
    """The moments in one of our checkpoints.

    Raises:
        ValueError: files of the checkpoint are missing.
    """
    state = read_state(checkpoint)
    models = checkpoint / (STAGE3_MODEL_STATES if state.zero_stage == 3 else MODEL_STATES)
    ranks = [checkpoint / OPTIMIZER_STATES.format(rank=rank) for rank in range(state.world_size)]
    for path in (models, *(ranks if state.zero_stage else ())):
        if not path.is_file():
            raise ValueError(f"{checkpoint} has no {path.name}: copy all of the checkpoint")
    model = load_deepspeed_file(str(models), "cpu")
    if not state.zero_stage:
        return Moments(state.updates, _whole(model))
    parts = [load_deepspeed_file(str(path), "cpu")["optimizer_state_dict"] for path in ranks]
    shapes = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
    pieces = _from_partitions(parts, shapes) if state.zero_stage == 3 else _from_fragments(parts)
    averages = {
        kind: {name: torch.cat(pieces[kind][name])[: shape.numel()].view(shape) for name, shape in shapes.items()}
        for kind in _KINDS
    }
    return Moments(state.updates, averages)


def _whole(model: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Stage 0: torch's state dictionary, which numbers the parameters in the order of `parameter_groups`."""
    weights = {name: tensor for name, tensor in model["module"].items() if name not in model["buffer_names"]}
    names = [name for name, w in weights.items() if w.ndim > 1] + [name for name, w in weights.items() if w.ndim <= 1]
    states = [model["optimizer"]["state"][number] for number in range(len(names))]
    averages = {kind: {name: s[kind] for name, s in zip(names, states, strict=True)} for kind in _KINDS}
    assert all(average.shape == weights[name].shape for name, average in averages["exp_avg"].items())
    return averages


def _from_fragments(parts: Iterable[Any]) -> dict[str, dict[str, list[Tensor]]]:
    """Stages 1 and 2: each rank has a stretch of all parameters of a group, laid end to end."""
    pieces: dict[str, dict[str, list[Tensor]]] = {kind: {} for kind in _KINDS}
    for part in parts:
        for group, fragments in enumerate(part["param_slice_mappings"]):
            state = part["base_optimizer_state"]["state"][group]
            for name, place in fragments.items():
                for kind in _KINDS:
                    piece = state[kind][place.start : place.start + place.numel]
                    pieces[kind].setdefault(name, []).append(piece)
    return pieces


def _from_partitions(parts: list[Any], shapes: Mapping[str, torch.Size]) -> dict[str, dict[str, list[Tensor]]]:
    """Stage 3: each rank has an equal part of every parameter, the last one padded, in the order of `shapes`."""
    pieces: dict[str, dict[str, list[Tensor]]] = {}
    for kind in _KINDS:
        flats = [
            torch.cat([state[kind].flatten() for _, state in sorted(part["optimizer_state_dict"]["state"].items())])
            for part in parts
        ]
        at, pieces[kind] = 0, {}
        for name, shape in shapes.items():
            length = math.ceil(shape.numel() / len(parts))
            pieces[kind][name] = [flat[at : at + length] for flat in flats]
            at += length
    return pieces


def set_moments(engine: Any, moments: Moments) -> None:
    """Gives them to a new engine's optimizer; parameters of which there are none begin with zeros.

    Called by all ranks together.
    """
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    optimizer, stage = engine.basic_optimizer, engine.zero_optimization_stage()
    named = {name: p for name, p in engine.module.named_parameters() if name in moments.averages[_KINDS[0]]}
    # ZeRO's optimizer trains flat partitions, which have no state before the first step.
    if stage == 3:
        trained = engine.optimizer.fp32_partitioned_groups_flat
    else:
        trained = engine.optimizer.single_partition_of_fp32_groups if stage else named.values()
    for tensor in trained:
        step = torch.tensor(float(moments.updates), device=tensor.device)
        optimizer.state[tensor] = {"step": step, **{kind: torch.zeros_like(tensor) for kind in _KINDS}}
    if stage in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in named.items():
        for kind, averages in moments.averages.items():
            value = averages[name].to(parameter.device)
            if stage == 0:
                optimizer.state[parameter][kind].copy_(value)
            elif stage == 3:  # DeepSpeed's function for whole parameters does not pad
                length = parameter.ds_tensor.numel()
                padded = F.pad(value.flatten(), (0, length * engine.world_size - value.numel()))
                safe_set_local_optimizer_state(parameter, padded[length * engine.global_rank :][:length], kind)
            else:
                safe_set_full_optimizer_state(parameter, value, kind)
