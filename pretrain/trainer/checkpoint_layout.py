"""The layout of a checkpoint on disk, and how its files are read; for all code that writes or reads one.

checkpoints/
    step_00001000/      DeepSpeed's files, one set per rank; EMA_FILE if there is a moving average; and MANIFEST, with
                        the state of the run, the size and CRC-32 of each file, and a CRC-32 of all of this
    latest              the name of the checkpoint that was written last, or that the run has resumed from since
    unfinished/         a save in progress, or the remains of one that was killed
    damaged_step_*/     a damaged checkpoint, of a step that the run has since trained again
    deleted_step_*/     a checkpoint that was being deleted when the run was killed
"""

import functools
import json
import pickle
import re
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from data.reader import RETRY_AFTER, TRANSIENT

Content = TypeVar("Content")

MANIFEST = "manifest.json"
EMA_FILE = "ema.safetensors"
LATEST = "latest"
UNFINISHED = "unfinished"
ASIDE, DELETED = "damaged_", "deleted_"  # prefixes of a checkpoint's name
MODEL_STATES = "mp_rank_00_model_states.pt"  # whole weights, in ZeRO stages 0 to 2
STAGE3_RANK_STATES = "zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
STAGE3_MODEL_STATES = STAGE3_RANK_STATES.format(rank=0)
OPTIMIZER_STATES = "zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"  # in ZeRO stages 1 to 3
ANY_MODEL_STATES = "*_model_states.pt"
_CRC = "crc32"  # in the manifest: of everything else in it
_STEP = re.compile(r"step_(\d{8,})")


@dataclass
class TrainState:
    """The progress of a run, and what must not change when it resumes; the same on every rank."""

    step: int = 0  # global batches consumed
    updates: int = 0  # steps that changed the weights
    consecutive_nonfinite: int = 0
    samples: int = 0
    fingerprint: str = ""  # of the shards' index
    shards: dict[str, list[int]] = field(default_factory=dict)  # a shard_record.Record
    index_samples: int = 0  # in all shards; 0 in checkpoints that are older than this field
    offset: int = 0  # `step` plus this is the position in the order; not 0 once other shards were accepted
    shard_changes: list[dict[str, Any]] = field(default_factory=list)  # accepted so far, with their steps
    world_size: int = 1
    zero_stage: int = 0
    resume_signature: dict[str, Any] = field(default_factory=dict)  # of the configuration
    numerics: dict[str, Any] = field(default_factory=dict)  # kernels and precisions: others give other bits
    start: dict[str, str] = field(default_factory=dict)  # the file whose weights it began with, and its SHA-256
    machine: dict[str, Any] = field(default_factory=dict)  # device and versions: others may give other bits


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def checkpoint_step(checkpoint: Path | str) -> int | None:
    """The step in the name of a checkpoint's folder; None for other folders, such as a copy that somebody made."""
    named = _STEP.fullmatch(Path(checkpoint).name)
    return int(named[1]) if named else None


def checkpoint_names(folder: Path) -> list[str]:
    """The names of a run's finished checkpoints, latest step first."""
    steps = {path.name: checkpoint_step(path) for path in folder.glob("step_*")}
    return sorted((name for name, step in steps.items() if step is not None), key=lambda name: -(steps[name] or 0))


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, or else the newest; None if there is none yet."""
    latest, names = folder / LATEST, checkpoint_names(folder)
    named = latest.read_text(errors="replace").strip() if latest.is_file() else None
    return folder / (named if named in names else names[0]) if names else None


def manifest_text(state: TrainState, files: dict[str, list[int]]) -> str:
    """The text of a checkpoint's manifest.

    Args:
        files: size and CRC-32 of each file, by name.
    """
    content = {"state": asdict(state), "files": dict(sorted(files.items()))}
    return json.dumps({**content, _CRC: _crc(json.loads(json.dumps(content)))}, indent=1)


def _crc(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _patiently(read: Callable[[], Content]) -> Content:
    """Reads, and again after errors of a network file system that pass: they do not mean that a file is damaged."""
    for pause in RETRY_AFTER:
        try:
            return read()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            time.sleep(pause)
    return read()


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Raises ValueError if it is missing, unreadable or was changed; older ones have no CRC that would show it."""
    try:
        content = json.loads(_patiently((checkpoint / MANIFEST).read_bytes))
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{MANIFEST} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{MANIFEST} was not written by this project")
    if _CRC in content and content.pop(_CRC) != _crc(content):
        raise ValueError(f"{MANIFEST} differs from what was written")
    return content


def read_state(checkpoint: Path) -> TrainState:
    """The state of the run, from the manifest.

    Raises:
        ValueError: no manifest, a changed one, or not one of this project.
    """
    try:
        return TrainState(**_read_manifest(checkpoint)["state"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST} has no valid run state ({error})") from None


def read_files(checkpoint: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of each file, by the manifest.

    Raises:
        ValueError: no manifest, a changed one, or one without files.
    """
    files = _read_manifest(checkpoint).get("files")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{MANIFEST} lists no files")
    if any(Path(name).name != name or not _is_pair(numbers) for name, numbers in files.items()):
        raise ValueError(f"{MANIFEST} was not written by this project")
    return files


def _is_pair(numbers: Any) -> bool:
    return isinstance(numbers, list) and len(numbers) == 2 and all(isinstance(number, int) for number in numbers)


def damage(checkpoint: Path, read: bool = True, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is sound.

    Args:
        read: read all files and compare their checksums, not only their sizes.
        part, parts: check every `parts`-th file, from file `part` on, so that ranks share the work.
    """
    try:
        step = read_state(checkpoint).step
        files = read_files(checkpoint)
    except ValueError as error:
        return str(error)
    if checkpoint_step(checkpoint) not in (step, None):
        return f"{MANIFEST} says step {step}: another checkpoint was copied here"
    for name in sorted(files)[part::parts]:
        path = checkpoint / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            size, crc = files[name]
            if (found := path.stat().st_size) != size:
                return f"{name} has {found} bytes instead of {size}"
            if read and _patiently(functools.partial(size_and_crc, path)) != [size, crc]:
                return f"{name} differs from what was written"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None


def size_and_crc(path: Path) -> list[int]:
    """Size in bytes and CRC-32."""
    size = total = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size += len(block)
            total = zlib.crc32(block, total)
    return [size, total]


def deepspeed_types() -> list[Any]:
    """The types in DeepSpeed's files besides tensors and plain values; unpickling them runs no code."""
    # Imported late: DeepSpeed looks for its accelerator on import.
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [ZeroStageEnum, LossScaler, fragment_address]


def load_deepspeed_file(path: str, map_location: Any = None, mmap: bool = False) -> Any:
    """Loads tensors, plain values and `deepspeed_types`; a file with anything else is refused, not unpickled.

    Args:
        mmap: leave tensors on disk until they are used.

    Raises:
        ValueError: it holds anything else.
    """
    try:
        with torch.serialization.safe_globals(deepspeed_types()):
            return torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except pickle.UnpicklingError:  # whose text advises to load it all the same
        raise ValueError(
            f"{path} holds something other than tensors and plain values, which could run code: it is refused, as it "
            "was not written by this project"
        ) from None
