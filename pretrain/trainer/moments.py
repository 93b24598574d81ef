"""AdamW's moments, out of a checkpoint of any ZeRO stage and number of ranks, into an engine of any other."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.trainer.stored_state import MOMENTS, StoredState


@dataclass(frozen=True)
class Moments:
    """Of some parameters; read from the checkpoint when they are needed.

    Attributes:
        stored: that has them.
        names: parameter -> its name there.
    """

    stored: StoredState
    names: Mapping[str, str]

    def renamed(self, taken: Mapping[str, str]) -> "Moments":
        """Those of some parameters under other names.

        Args:
            taken: new name -> the one here; names that are not here are left out, such as those of buffers.
        """
        return Moments(self.stored, {new: self.names[old] for new, old in taken.items() if old in self.names})

    def find(self, name: str, kind: str) -> Tensor | None:
        """One of `MOMENTS`, of the parameter's shape, in fp32; None if it is of no parameter here."""
        return self.stored.moment(self.names[name], kind) if name in self.names else None


def read_moments(checkpoint: Path) -> Moments:
    """All moments in one of our checkpoints of a pretraining.

    Raises:
        ValueError: files of the checkpoint are missing.
    """
    stored = StoredState(checkpoint)
    return Moments(stored, {name: name for name in stored.trained})


@dataclass(frozen=True)
class Piece:
    """Elements `begin` to `end` of a parameter, laid flat; they are at `place` in a tensor that is trained."""

    name: str
    begin: int
    end: int
    place: int


def trained_tensors(engine: Any) -> Iterator[tuple[Tensor, list[Piece]]]:
    """What this rank's optimizer trains, and what of the parameters is in it, in the order of the parameter groups."""
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
                # A view of the group's flat tensor, which has its parameters in whatever order and alignment.
                place = parameter.storage_offset() - flat.storage_offset() - rank * partition.numel()
                begin, end = (min(max(edge - place, 0), parameter.numel()) for edge in (0, partition.numel()))
                pieces.append(Piece(engine.param_names[parameter], begin, end, place + begin))
            yield partition, pieces


def set_moments(engine: Any, moments: Moments) -> None:
    """Gives them to a new engine's optimizer; parameters of which there are none begin with zeros.

    Adam corrects its bias by the number of updates: in stage 0 these parameters begin at 0, and elsewhere, where a
    tensor has several, as the others.
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
