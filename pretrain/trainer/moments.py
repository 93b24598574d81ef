"""Loads AdamW's moments from a checkpoint into an engine, whatever the ZeRO stage and number of ranks of each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.trainer.stored_state import MOMENTS, StoredState


@dataclass(frozen=True)
class Moments:
    """The moments of some parameters, read from the checkpoint when they are needed.

    Attributes:
        stored: the checkpoint's state, which has them.
        names: parameter -> its name there.
    """

    stored: StoredState
    names: Mapping[str, str]

    def renamed(self, taken: Mapping[str, str]) -> "Moments":
        """The moments of some of the parameters, under other names.

        Args:
            taken: new name -> name here; names that are not here, such as those of buffers, are left out.
        """
        return Moments(self.stored, {new: self.names[old] for new, old in taken.items() if old in self.names})

    def find(self, name: str, kind: str) -> Tensor | None:
        """One of `MOMENTS` of a parameter, in its shape and in fp32; None if the parameter is not here."""
        return self.stored.moment(self.names[name], kind) if name in self.names else None


def read_moments(checkpoint: Path) -> Moments:
    """All moments in one of our pretraining checkpoints.

    Raises:
        ValueError: files of the checkpoint are missing.
    """
    stored = StoredState(checkpoint)
    return Moments(stored, {name: name for name in stored.trained})


@dataclass(frozen=True)
class Piece:
    """Elements `begin` to `end` of a flattened parameter; they start at `place` in a tensor that is trained."""

    name: str
    begin: int
    end: int
    place: int


def trained_tensors(engine: Any) -> Iterator[tuple[Tensor, list[Piece]]]:
    """The tensors that this rank's optimizer trains, and the pieces of parameters in each, in order of the groups."""
    stage, optimizer, rank = engine.zero_optimization_stage(), engine.optimizer, engine.global_rank
    if stage == 0:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            yield parameter, [Piece(engine.param_names[parameter], 0, parameter.numel(), 0)]
    elif stage == 3:
        for group, partition in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
            place, pieces = 0, []
            for parameter in group:
                length = parameter.ds_tensor.numel()
                begin, end = (min(edge * length, parameter.ds_numel) for edge in (rank, rank + 1))
                pieces.append(Piece(engine.param_names[parameter], begin, end, place))
                place += length
            yield partition, pieces
    else:
        partitions = optimizer.single_partition_of_fp32_groups
        for group, flat, partition in zip(optimizer.bit16_groups, optimizer.bit16_groups_flat, partitions, strict=True):
            pieces = []
            for parameter in group:
                # A view of the group's flat tensor, which holds its parameters in any order and alignment.
                place = parameter.storage_offset() - flat.storage_offset() - rank * partition.numel()
                begin, end = (min(max(edge - place, 0), parameter.numel()) for edge in (0, partition.numel()))
                pieces.append(Piece(engine.param_names[parameter], begin, end, place + begin))
            yield partition, pieces


def set_moments(engine: Any, moments: Moments) -> None:
    """Sets the moments of a new engine's optimizer; parameters that have none here begin with zeros.

    Adam's bias correction depends on the number of updates. In stage 0 such parameters begin at 0 updates. In other
    stages, where a tensor holds several parameters, they share the number of the others.
    """
    state = engine.basic_optimizer.state
    for tensor, pieces in trained_tensors(engine):
        begins = engine.zero_optimization_stage() == 0 and pieces[0].name not in moments.names
        step = torch.tensor(0.0 if begins else moments.stored.step, device=tensor.device)
        state[tensor] = {"step": step, **{kind: torch.zeros_like(tensor) for kind in MOMENTS}}
        for piece in pieces:
            for kind in MOMENTS:
                value = moments.find(piece.name, kind) if piece.begin < piece.end else None
                if value is not None:
                    place = slice(piece.place, piece.place + piece.end - piece.begin)
                    state[tensor][kind].view(-1)[place] = value.flatten()[piece.begin : piece.end]
