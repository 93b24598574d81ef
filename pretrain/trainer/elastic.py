"""Continues a training on another number of ranks, or in another ZeRO stage.

DeepSpeed loads its files only into the layout that wrote them. Its converter to "universal" checkpoints unpickles
whatever is in them, leaves buffers out, and in stage 3 gives all parameter groups the options of the first.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.trainer.checkpoint_layout import MODEL_STATES, STAGE3_MODEL_STATES, TrainState, load_deepspeed_file
from pretrain.trainer.moments import Moments, set_moments, trained_tensors
from pretrain.trainer.stored_state import StoredState

BY_STAGE = "compile was"  # the change of numerics that another stage causes: model.compile=auto is off in stage 3


def layout_change(state: TrainState, now: TrainState) -> list[str]:
    """Why ranks hold other parts of the training than those that wrote a checkpoint, and sum in another order."""
    pairs = {
        "the number of ranks": (state.world_size, now.world_size),
        "the ZeRO stage (train.ds_config)": (state.zero_stage, now.zero_stage),
    }
    return [f"{what} was {before} and is {after}" for what, (before, after) in pairs.items() if before != after]


def has_other_parts(engine: Any, checkpoint: Path, state: TrainState, now: TrainState) -> bool:
    """Whether ranks of this engine hold other parts of the training than those that wrote a checkpoint.

    Keys in DeepSpeed's `zero_optimization` can cause that, too. DeepSpeed notices some of them, and loads wrong moments
    with others (`round_robin_gradients`).
    """
    if state.zero_stage == now.zero_stage == 0:
        return False  # every rank holds all of it
    if layout_change(state, now):
        return True
    file = checkpoint / (STAGE3_MODEL_STATES if state.zero_stage == 3 else MODEL_STATES)
    written = load_deepspeed_file(str(file), "cpu", mmap=True)["ds_config"]
    return bool(written["zero_optimization"] != engine.config["zero_optimization"])


@torch.no_grad()
def load_parts(engine: Any, checkpoint: Path) -> None:
    """Loads weights, buffers and the optimizer's state into a new engine; each rank takes its part of every tensor.

    Called by all ranks together. It reads tensor by tensor: no rank holds more than its part and one whole parameter.

    Raises:
        ValueError: the checkpoint has other parameters.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    groups = [[piece.name for piece in pieces] for _, pieces in trained_tensors(engine)]
    stored = StoredState(checkpoint, [name for names in groups for name in names])
    _check_parameters(engine, stored, checkpoint)
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # partitions the parameters that are whole on every rank, too
    for name, parameter in engine.module.named_parameters():
        weight = stored.weight(name)
        if stage == 3:
            parameter.ds_tensor.copy_(_part(weight, parameter.ds_tensor.numel(), engine.global_rank))
        else:
            parameter.copy_(weight)
    if stage:
        optimizer.refresh_fp32_params()
    if stage == 3:
        optimizer.checkpoint_event_epilogue()
    buffers = dict(engine.module.named_buffers())
    for name, buffer in stored.buffers.items():
        buffers[name].copy_(buffer)
    set_moments(engine, Moments(stored, {name: name for name in stored.trained}))
    engine.global_steps, engine.skipped_steps = stored.model["global_steps"], stored.model["skipped_steps"]
    engine.global_samples = engine.global_steps * engine.train_batch_size()


def _part(whole: Tensor, length: int, rank: int) -> Tensor:
    """A rank's part of a parameter in stage 3, padded with zeros at the end."""
    part = whole.flatten()[rank * length : (rank + 1) * length]
    return F.pad(part, (0, length - part.numel()))


def _check_parameters(engine: Any, stored: StoredState, checkpoint: Path) -> None:
    here = {name: torch.Size(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
    there = stored.shapes
    other = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if other:
        shapes = [list(found[other[0]]) if other[0] in found else "absent" for found in (there, here)]
        raise ValueError(
            f"the parameters of {checkpoint} differ from this code's ({len(other)} of them): {other[0]} is "
            f"{shapes[0]} there and {shapes[1]} here; continue with the code that wrote it"
        )
