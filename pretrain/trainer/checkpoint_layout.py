"""The layout of a checkpoint on disk, and how its files are read: for those who write, resume, export or inspect one.

checkpoints/
    step_00001000/      DeepSpeed's files, one set a rank; EMA_FILE where there is a moving average; and MANIFEST, with
                        the state of the run and every file's size and CRC-32
    latest              the newest one's name
    unfinished/         a save in progress, or what a killed one left
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MANIFEST = "manifest.json"
EMA_FILE = "ema.safetensors"
LATEST = "latest"
UNFINISHED = "unfinished"
CONVERTED = "converted"  # a checkpoint for another number of ranks, while it is loaded
MODEL_STATES = "mp_rank_00_model_states.pt"  # whole weights, in ZeRO stages 0 to 2
STAGE3_MODEL_STATES = "zero_pp_rank_0_mp_rank_00_model_states.pt"
STAGE3_OPTIMIZER_STATES = "zero_pp_rank_*_optim_states.pt"
ANY_MODEL_STATES = "*_model_states.pt"
_STEP = "step_"


@dataclass
class TrainState:
    """Where a run is: small, plain, and the same on every rank."""

    step: int = 0  # global batches consumed
    updates: int = 0  # of them, those that moved the weights
    consecutive_nonfinite: int = 0
    samples: int = 0
    fingerprint: str = ""  # of the shards' index
    world_size: int = 1
    zero_stage: int = 0
    resume_signature: dict[str, Any] = field(default_factory=dict)  # of the configuration


def checkpoint_name(step: int) -> str:
    return f"{_STEP}{step:08d}"


def checkpoint_step(checkpoint: Path | str) -> int | None:
    """The step of a checkpoint's folder, by its name; None where it is none."""
    name = Path(checkpoint).name
    return int(name.removeprefix(_STEP)) if name.startswith(_STEP) else None


def checkpoint_names(folder: Path) -> list[str]:
    """The finished checkpoints of a run, newest first."""
    return sorted((path.name for path in folder.glob(f"{_STEP}*")), reverse=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """The one that `latest` names; None where there is none yet."""
    latest = folder / LATEST
    return folder / latest.read_text().strip() if latest.is_file() else None


def read_state(checkpoint: Path) -> TrainState:
    """The state of the run, from the manifest.

    Raises:
        OSError, ValueError, KeyError, TypeError: there is no manifest, or it is not one of this project.
    """
    return TrainState(**json.loads((checkpoint / MANIFEST).read_text())["state"])


def deepspeed_types() -> list[Any]:
    """What DeepSpeed's files hold beside tensors and plain values; none of it runs code when it is unpickled."""
    # DeepSpeed looks for its accelerator as soon as it is imported: not before it is needed.
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [ZeroStageEnum, LossScaler, fragment_address]


def load_deepspeed_file(path: str, map_location: Any = None) -> Any:
    """Tensors, plain values and `deepspeed_types`; anything else in the file is refused, not unpickled."""
    with torch.serialization.safe_globals(deepspeed_types()):
        return torch.load(path, map_location=map_location, weights_only=True)
