"""Weights and AdamW's moments in a checkpoint of any ZeRO stage and number of ranks, whole and by parameter name.

What DeepSpeed's files hold, as read here:

stage 0     whole weights; the moments of each parameter, by its number in the optimizer
stages 1, 2 whole weights; for each parameter group the moments of all parameters end to end, cut into a part per rank
stage 3     for each group (a long one is split into several), each rank's part of every parameter, end to end; a
            parameter is cut into as many equal parts as there are ranks, the last one padded
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.trainer.checkpoint_layout import (
    MODEL_STATES,
    OPTIMIZER_STATES,
    STAGE3_RANK_STATES,
    load_deepspeed_file,
    read_state,
)
from pretrain.trainer.optim import decays

MOMENTS = ("exp_avg", "exp_avg_sq")


def _load(path: Path) -> Any:
    return load_deepspeed_file(str(path), "cpu", mmap=True)


@dataclass(frozen=True)
class _Place:
    """Where a parameter begins: at element `start` of its group's tensors."""

    group: int
    start: int


class StoredState:
    """The state of a training. Each tensor stays on disk until it is asked for.

    Args:
        checkpoint: one of ours.
        trained: the names of the trained parameters in the order of the optimizer's groups; the files of stage 0 do not
            contain them. None: the order of `parameter_groups`.
        load: reads a file without running code that is in it.

    Attributes:
        shapes: of all parameters, those that are not trained last.
        trained: the parameters that have moments.
        step: the number of updates in the moments; 0 before the first.
        buffers: of the module, by their names.
        model: DeepSpeed's file about the module and its own counts.

    Raises:
        ValueError: files of the checkpoint are missing or hold less than the parameters need, or, without `trained`,
            stage 0 had other groups than those of `parameter_groups`.
    """

    def __init__(
        self, checkpoint: Path, trained: Sequence[str] | None = None, load: Callable[[Path], Any] = _load
    ) -> None:
        self._checkpoint, state = checkpoint, read_state(checkpoint)
        self.stage, ranks = state.zero_stage, range(state.world_size)
        models = [checkpoint / MODEL_STATES]
        if self.stage == 3:
            models = [checkpoint / STAGE3_RANK_STATES.format(rank=rank) for rank in ranks]
        optimizers = [checkpoint / OPTIMIZER_STATES.format(rank=rank) for rank in ranks] if self.stage else []
        _check_files(checkpoint, models, optimizers)
        self.model = load(models[0])
        self._zero = [load(path)["optimizer_state_dict"] for path in optimizers]
        module: dict[str, Tensor] = self.model["module"]
        self.buffers = {name: module[name] for name in self.model["buffer_names"] if name in module}
        self._whole = {name: t for name, t in module.items() if name not in self.buffers} if self.stage < 3 else {}
        self._frozen: list[dict[str, Tensor]] = []
        frozen = (self.model.get("frozen_param_shapes") or {}) if self.stage == 3 else {}
        if frozen:
            self._frozen = [load(path)["frozen_param_fragments"] for path in models]
        self._places, shapes = self._find_places(trained)
        self.trained = list(shapes)
        self.shapes = shapes | {name: t.shape for name, t in self._whole.items() if name not in shapes} | frozen
        steps = (group.get("step", 0) for states in self._optimizers() for group in states.values())
        self.step = max(map(float, steps), default=0.0)

    def weight(self, name: str) -> Tensor:
        """A parameter in fp32, in its shape."""
        if name in self._whole:
            return self._whole[name]
        if name not in self._places:
            return self._join([rank[name] for rank in self._frozen], 0, name)
        place = self._places[name]
        return self._join([rank["fp32_flat_groups"][place.group] for rank in self._zero], place.start, name)

    def moment(self, name: str, kind: str) -> Tensor:
        """One of `MOMENTS` of a trained parameter, in fp32 and its shape; zeros before the first update."""
        place = self._places[name]
        flats = [states[place.group][kind] for states in self._optimizers() if kind in states.get(place.group, ())]
        return self._join(flats, place.start, name) if flats else torch.zeros(self.shapes[name])

    def _optimizers(self) -> list[dict[int, Any]]:
        """The optimizer state of each rank, by group number; in stage 0 of one rank, by parameter number."""
        if not self.stage:
            return [self.model["optimizer"]["state"]]
        kept = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        return [rank[kept]["state"] for rank in self._zero]

    def _find_places(self, trained: Sequence[str] | None) -> tuple[dict[str, _Place], dict[str, torch.Size]]:
        places: dict[str, _Place] = {}
        if not self.stage:
            names = self._numbered() if trained is None else list(trained)
            places = {name: _Place(number, 0) for number, name in enumerate(names)}
            return places, {name: self._whole[name].shape for name in names}
        shapes: dict[str, torch.Size] = {}
        padded = self._zero[0].get("param_alignment_paddings")
        for group, members in enumerate(self.model["param_shapes"]):
            start = 0
            for number, (name, shape) in enumerate(members.items()):
                places[name] = _Place(group, start)
                start += math.ceil(shape.numel() / len(self._zero)) if self.stage == 3 else shape.numel()
                start += padded[group][number] if padded else 0
            shapes |= members
        return places, shapes

    def _numbered(self) -> list[str]:
        """The order in which `parameter_groups` gave the parameters to the optimizer of stage 0."""
        first = len(self.model["optimizer"]["param_groups"][0]["params"])
        for decay_class_token in (True, False):
            decaying = [name for name, t in self._whole.items() if decays(name, t.ndim, decay_class_token)]
            if len(decaying) == first:
                return decaying + [name for name in self._whole if name not in decaying]
        raise ValueError(
            f"the parameter groups of {self._checkpoint} are unnamed and differ from those of pretraining: set "
            f"start.optimizer=false"
        )

    def _join(self, flats: list[Tensor], start: int, name: str) -> Tensor:
        """Joins a parameter's elements from the tensors of all ranks."""
        shape = self.shapes[name]
        numel = shape.numel()
        if self.stage == 3:
            end = start + math.ceil(numel / len(flats))
            pieces = [flat[start:end] for flat in flats]
        else:
            pieces, before = [], 0
            for flat in flats:
                flat = flat.flatten()
                pieces.append(flat[max(start - before, 0) : max(start + numel - before, 0)])
                before += flat.numel()
        whole = torch.cat(pieces)[:numel]
        if whole.numel() < numel:
            raise ValueError(f"{self._checkpoint} has only {whole.numel()} of the {numel} elements of {name}")
        return whole.view(shape)


def _check_files(checkpoint: Path, *kinds: list[Path]) -> None:
    for paths in kinds:
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            found = (
                f"{len(paths) - len(missing)} of {len(paths)} ranks' files" if len(paths) > 1 else "some of its files"
            )
            raise ValueError(f"{checkpoint} has only {found}, no {missing[0]}: copy the whole checkpoint")
