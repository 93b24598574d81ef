"""Reads the engine's file, `train.ds_config`; refuses keys that DeepSpeed does not know or that the recipe owns.

DeepSpeed itself silently ignores top-level keys that it does not know.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pretrain.trainer.problems import problem_words
from pretrain.trainer.schema import nearest, similar

_ROOT = Path(__file__).parents[2]
_SHIPPED = _ROOT / "ds_configs"
AUTO = "auto"

# DeepSpeed keys that the recipe owns. If they could be set in both places, one would silently win.
OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.global_batch_size and train.gradient_accumulation_steps",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "optim.clip_grad",
    "optimizer": "optim",
    "scheduler": "optim",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "activation_checkpointing": "model.grad_checkpointing",
}

# All other keys that DeepSpeed reads: sections, and values by their types.
_SECTION_NAMES = """
    aio autotuning checkpoint comet comms_logger compile csv_monitor data_efficiency datastates_ckpt expert_parallel
    flops_profiler hybrid_engine pipeline tensor_parallel tensorboard timers wandb weight_quantization zero_optimization
"""
_FLAG_NAMES = """
    dataloader_drop_last disable_allgather disable_python_gc dump_state managed_gradient_accumulation memory_breakdown
    prescale_gradients use_data_before_expert_parallelism wall_clock_breakdown zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer
"""
_TEXT_NAMES = "communication_data_type gradient_allreduce_op log_level seq_parallel_communication_data_type"
_SECTIONS = frozenset(_SECTION_NAMES.split())
_VALUES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_FLAG_NAMES.split(), (bool,)),
    **dict.fromkeys(_TEXT_NAMES.split(), (str,)),
    **dict.fromkeys(("steps_per_print", "vocabulary_size"), (int,)),
    "gradient_predivide_factor": (int, float),
}
_KINDS = {(bool,): "true or false", (str,): "text", (int,): "a whole number", (int, float): "a number"}
ENGINE_KEYS = _SECTIONS | _VALUES.keys()
# Sections in which DeepSpeed looks up the keys that it knows, and does not notice others.
_LOOKED_UP = ("aio", "checkpoint", "flops_profiler")


def read_ds_config(name: str, owned: dict[str, str] = OWNED) -> dict[str, Any]:
    """The engine keys of `train.ds_config`: the name of a file in ds_configs/, or the path of one.

    `auto`, as in files for Hugging Face's Trainer, stands for the recipe's value if the recipe owns the key, and for
    DeepSpeed's default within a section.

    Args:
        name: such as `zero1`, or a JSON file.
        owned: keys that may not be in the file, and the keys of the recipe that set them.

    Raises:
        ValueError: no such file, not JSON, or keys that DeepSpeed does not know or that the recipe owns: one line each,
            followed by the problems of `check_sections`.
    """
    path = next((p for p in (_SHIPPED / f"{name}.json", Path(name), _ROOT / name) if p.is_file()), None)
    if path is None:
        shipped = [p.stem for p in _SHIPPED.glob("*.json")]
        raise ValueError(
            f"train.ds_config={name!r} is neither a file nor a name in ds_configs/: {nearest(name, shipped)}"
        )
    try:
        keys = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_refuse_twice)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(keys, dict):
        raise ValueError(f"{path} is not a JSON object of DeepSpeed's keys")
    problems = {key: problem for key, value in keys.items() if (problem := _problem(key, value, owned))}
    kept = {key: _without_auto(value) for key, value in keys.items() if key not in owned and key not in problems}
    if problems:
        lines = [f"{path} {problem}" for problem in problems.values()]
        raise ValueError("\n".join([*lines, *_problems_of_sections({"train_micro_batch_size_per_gpu": 1, **kept})]))
    return kept


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"duplicate key {twice}")
    return dict(pairs)


def _problem(key: str, value: Any, owned: dict[str, str]) -> str | None:
    """What is wrong with a top-level key, if anything."""
    if key in owned:
        if _is_auto(value):
            return None
        return f"sets {key}, which the recipe owns: delete it there and set {owned[key]}"
    if key not in ENGINE_KEYS:
        return f"sets {key}, which DeepSpeed does not know: {_nearest_key(key, owned)}"
    if key in _SECTIONS and not isinstance(value, dict):
        return f"sets {key}={json.dumps(value)}: must be a section, such as {{}}"
    if value == AUTO or (key == "zero_optimization" and value.get("stage") == AUTO):
        whole = key if value == AUTO else f"{key}.stage"
        return f"sets {whole}={AUTO}, which the recipe has no value for: give one, or delete it for DeepSpeed's default"
    types = _VALUES.get(key)
    if types and value is not None and not (isinstance(value, types) and isinstance(value, bool) == (bool in types)):
        return f"sets {key}={json.dumps(value)}: must be {_KINDS[types]}"
    return None


def _nearest_key(key: str, owned: dict[str, str]) -> str:
    known = sorted(ENGINE_KEYS | owned.keys())
    return nearest(key, known) if similar(key, known) else "delete it, or look it up in DeepSpeed's documentation"


def _is_auto(value: Any) -> bool:
    """Whether it holds nothing but `auto`."""
    if isinstance(value, dict):
        return all(map(_is_auto, value.values()))
    return bool(value == AUTO)


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_auto(inner) for key, inner in value.items() if inner != AUTO}
    return value


def check_sections(settings: dict[str, Any]) -> None:
    """Has DeepSpeed read its keys as it will when the engine is built.

    Raises:
        ValueError: what it refuses, with the keys, one line each.
    """
    if lines := _problems_of_sections(settings):
        raise ValueError("\n".join(lines))


def _problems_of_sections(settings: dict[str, Any]) -> list[str]:
    """What DeepSpeed refuses.

    It stops at the first bad section and does not say which one that is, so each section, and what is outside all of
    them, is then read alone. What it refuses of the whole only counts if it accepts these parts.
    """
    whole = _refusals(settings)
    if not whole:
        return []
    names = sorted(_SECTIONS & settings.keys())  # in the same order in every process
    outside = {key: value for key, value in settings.items() if key not in names}
    micro_batch = {"train_micro_batch_size_per_gpu": settings["train_micro_batch_size_per_gpu"]}
    parts = [outside, *({**micro_batch, name: settings[name]} for name in names)]
    return list(dict.fromkeys(line for part in parts for line in _refusals(part))) or whole


def _refusals(settings: dict[str, Any]) -> list[str]:
    """What DeepSpeed refuses first; if nothing, the keys that it does not look up."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    # Before the processes have joined, it does not know their number, which it would multiply by.
    keys = json.loads(json.dumps({key: value for key, value in settings.items() if key != "train_batch_size"}))
    sections = {name: _LookedUp(keys[name]) for name in _LOOKED_UP if name in keys}
    try:
        DeepSpeedConfig(keys | sections)
    except ValidationError as error:
        models = _models(DeepSpeedConfigModel)
        return [_refused(problem, models.get(error.title), settings) for problem in error.errors()]
    except Exception as error:  # whatever it raises
        return [f"DeepSpeed rejects train.ds_config: {error}"]
    return [
        f"train.ds_config sets {name}.{key}, which DeepSpeed does not know: {nearest(key, sorted(section.known))}"
        for name, section in sections.items()
        for key in sorted(section.rest())
    ]


class _LookedUp(dict[str, Any]):
    """A section that records which keys are looked up in it."""

    def __init__(self, keys: dict[str, Any]):
        super().__init__(keys)
        self.known: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.known.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.known.add(str(key))
        return super().__contains__(key)

    def rest(self) -> set[str]:
        """The keys that nobody looked up."""
        return self.keys() - self.known


def _models(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    found = {model.__name__: model}
    for inner in model.__subclasses__():
        found |= _models(inner)
    return found


def _refused(problem: Any, model: type[BaseModel] | None, settings: dict[str, Any]) -> str:
    """A line about a key within a section."""
    location = [str(part) for part in problem["loc"]]
    section = next((key for key in sorted(_SECTIONS) if location and location[0] in (settings.get(key) or ())), "")
    key = ".".join(filter(None, [section, *location]))
    if problem["type"] == "extra_forbidden":
        names = list(model.model_fields) if model is not None and len(location) == 1 else []
        near = nearest(location[-1], names) if names else "delete it"
        return f"train.ds_config sets {key}, which DeepSpeed does not know: {near}"
    return f"train.ds_config sets {key}={problem['input']}: {problem_words(problem)}"
