"""The command line for training on mmengine: a configuration, overrides of its keys, and keys of the run."""

import ast
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from mmengine.config import Config, ConfigDict, utils

from downstream.dense.job import Job
from downstream.dense.mmengine.encoder_start import set_start
from downstream.dense.mmengine.known_keys import READ, check_variables, explain_variable, known_keys
from pretrain.trainer.schema import nearest, split_argument

# If a configuration inherits "mmseg::...", mmengine looks for the package under its original name.
utils.MODULE2PACKAGE["mmseg"] = "onedl-mmsegmentation"

# For each inherited file, mmengine parses an index of all models in the package.
utils.load = functools.cache(utils.load)

# Keys of the run, named as in the pretraining recipes; configurations do not have them.
_RUN_KEYS: dict[str, Any] = {
    "name": None,
    "runs": None,
    "resume": True,
    "test": None,
    "tta": False,
    "start.checkpoint": None,
    "start.weights": None,
    "train.ds_config": None,
    "train.precision": None,
}
_TEXT = {"name", "runs", "test", "start.checkpoint", "start.weights", "train.ds_config"}  # taken as they are typed
_CHOICES = {"train.precision": ("fp32", "bf16")}

# mmengine's keys that can be overridden even if the configuration does not set them.
_DEFAULTS = {
    "load_from": None,
    "randomness": {"seed": 0},
    "find_unused_parameters": False,
    "auto_scale_lr": {"enable": False},
    "optim_wrapper": {"accumulative_counts": 1, "clip_grad": None},
    "default_hooks": {"checkpoint": {"type": "CheckpointHook", "interval": 1, "max_keep_ckpts": -1}},
}


def load_job(name: str, overrides: list[str], configs: Path, propagate: Callable[[Config], None]) -> Job:
    """Loads a configuration, by path or by its name in the folder `configs`, and applies `KEY=value` overrides.

    `propagate` then copies the top-level keys to wherever else they are read; a copy cannot be overridden.

    Besides the configuration's own keys, overrides can set those of the run: `name=` (its folder is runs/NAME; the
    default is the configuration's name), `runs=`, `start.checkpoint=FILE` and `start.weights=ema` (short for
    `model.backbone.init_cfg`), `train.ds_config=zero1|zero2|zero3|FILE`, `train.precision=fp32|bf16`, `resume=false`,
    `test=FILE` and `tta=true`.

    Raises:
        ValueError: no such configuration or key, or a value whose type differs from the configuration's.
    """
    cfg = _read(_find(name, configs))
    for key, value in _DEFAULTS.items():
        _set_default(cfg, key, value)
    run, overridden = dict(_RUN_KEYS), {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if key in _TEXT and equals:
            run[key] = _check_text(key, text)
            continue
        key, text, value = _split_override(override)
        if key in run:
            run[key] = _check_run_key(key, value)
        else:
            overridden[key] = _override(cfg, key, value, text)
    if run["tta"] and not run["test"]:
        raise ValueError("tta=true applies only to evaluation: give test=FILE as well")
    cfg.work_dir = _work_dir(run, cfg.get("work_dir") or f"runs/{Path(name).stem}")
    set_start(cfg, run["start.checkpoint"], run["start.weights"])
    _set_precision(cfg, run["train.precision"])
    propagate(cfg)
    _check_overridden(cfg, overridden)
    return Job(cfg, run["train.ds_config"], run["resume"], run["test"], run["tta"])


def _split_override(argument: str) -> tuple[str, str, Any]:
    """The key, the text after it, and its value; raises ValueError for an argument that is not `KEY=value`."""
    key, text = split_argument(argument, "KEY=value, for example train_cfg.max_epochs=25")
    try:
        return key, text, parse_value(text)
    except ValueError as error:
        raise ValueError(f"{argument!r}: {error}") from None


def parse_value(text: str) -> Any:
    """The value that was typed after `key=`: a Python literal, such as `(1333, 800)`, `1e-4` or `None`, or else YAML.

    YAML reads these three as strings, and Python cannot read `true`, `[random, simple]` or words without quotes.

    Raises:
        ValueError: neither of the two.
    """
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    else:
        if isinstance(value, str | int | float | list | tuple | dict | None):
            return value
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{text!r} is not a YAML value; are brackets or quotes closed?") from None


def _find(name: str, configs: Path) -> Path:
    for path in (Path(name), configs / name, configs / f"{name}.py"):
        if path.is_file():
            return path
    names = sorted(p.stem for p in configs.glob("*.py") if not p.stem.startswith("_"))
    raise ValueError(f"no configuration {name!r}: neither a file nor a shipped one; {nearest(Path(name).stem, names)}")


def _read(path: Path) -> Config:
    try:
        # Its modules are imported later, because DeepSpeed's accelerator is not chosen yet.
        cfg = Config.fromfile(path, import_custom_modules=False)
    except Exception as error:  # its Python can raise anything
        raise ValueError(f"{path} cannot be read as a configuration: {type(error).__name__}: {error}") from None
    check_variables(path)
    return cfg


def _set_default(tree: Any, key: str, value: Any) -> None:
    if key not in tree or (isinstance(value, dict) and tree[key] is None):
        tree[key] = value
    elif isinstance(value, dict):
        for inner, default in value.items():
            _set_default(tree[key], inner, default)


def _check_text(key: str, text: str) -> str | None:
    """The value of one of the run's text keys; raises ValueError if it is not valid."""
    if key == "name" and not re.fullmatch(r"[\w-][\w.-]*", text):
        raise ValueError(
            f"name={text!r}: must be a folder name of letters, digits, '_', '-' and '.', not starting with '.'"
        )
    return text if key == "name" or text not in ("", "null", "None") else None


def _check_run_key(key: str, value: Any) -> Any:
    """The value of another key of the run; raises ValueError for a wrong type or a value outside its choices."""
    if isinstance(_RUN_KEYS[key], bool):
        if not isinstance(value, bool):
            raise ValueError(f"{key}={value!r}: must be true or false")
    elif value is not None and value not in _CHOICES[key]:
        raise ValueError(f"{key}={value!r}: must be {' or '.join(_CHOICES[key])}")
    return value


def _work_dir(run: dict[str, Any], default: str) -> str:
    """The folder of the run: `runs`/`name`; missing parts come from `default`."""
    return str(Path(run["runs"] or Path(default).parent) / (run["name"] or Path(default).name))


def _find_key(cfg: Config, key: str) -> tuple[Any, Any]:
    """The dictionary or list that holds the value of a dotted key, and the last part of the key.

    A dictionary may lack the value if the key is one of its `known_keys`.

    Raises:
        ValueError: there is no such key, or nothing reads it.
    """
    if key == "work_dir":
        raise ValueError("work_dir is runs/NAME: give name=, and runs= for another parent folder")
    *above, last = key.split(".")
    tree: Any = cfg
    for depth, part in enumerate([*above, last]):
        names = [str(n) for n in range(len(tree))] if isinstance(tree, list) else list(map(str, tree))
        if part not in names:
            parent = ".".join([*above, last][:depth])
            known = known_keys(cfg, parent, tree)
            if part in known and depth == len(above):
                return tree, part
            if depth == 0:  # it may also be the first part of a key of the run
                run_key = next((known for known in _RUN_KEYS if known.startswith(f"{part}.")), None)
                near = nearest(key, list(_RUN_KEYS)) if run_key else nearest(part, [*{*names, *known, *_RUN_KEYS}])
                raise ValueError(f"unknown key {key}: {near}")
            raise ValueError(f"unknown key {key}: in {parent}, {nearest(part, [*{*names, *known}])}")
        if depth == 0 and part not in READ:
            advice = explain_variable(cfg, key)
            raise ValueError(f"{key}: {part} was already resolved when the configuration was read: {advice}")
        step = int(part) if isinstance(tree, list) else part
        if depth < len(above):
            tree = tree[step]
            if not isinstance(tree, dict | list):
                raise ValueError(f"unknown key {key}: {'.'.join(above[: depth + 1])} is a single value, {tree!r}")
    return tree, step


def _override(cfg: Config, key: str, value: Any, text: str) -> Any:
    tree, step = _find_key(cfg, key)
    missing = not isinstance(tree, list) and step not in list(tree)
    old = known_keys(cfg, key.rpartition(".")[0], tree)[step] if missing else tree[step]
    if isinstance(old, str) and not isinstance(value, str | list | tuple | dict | None):
        value = text
    if problem := None if missing else _wrong_type(old, value):
        raise ValueError(f"{key}={value!r}: {problem}")
    tree[step] = value
    return value


def _check_overridden(cfg: Config, overridden: dict[str, Any]) -> None:
    """Raises ValueError if a top-level key of the configuration replaced the value of an override."""
    for key, value in overridden.items():
        tree, step = _find_key(cfg, key)
        if tree[step] != value:
            raise ValueError(
                f"{key}={value!r}: a top-level key of the configuration sets it to {_shorten(tree[step])}: override "
                f"that key instead"
            )


def _wrong_type(old: Any, new: Any) -> str | None:
    kinds: list[tuple[tuple[type, ...], str]] = [
        ((bool,), "true or false"),
        ((int, float), "a number"),
        ((dict,), "a group of keys (or override one of them)"),
        ((list, tuple), "a list"),
        ((str,), "a string"),
    ]
    for types, description in kinds:
        if isinstance(old, types):
            fits = isinstance(new, types) and (bool in types or not isinstance(new, bool))
            return None if fits or new is None else f"must be {description}, as in the configuration ({_shorten(old)})"
    return None  # the old value is None, which does not reveal the type


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def _set_precision(cfg: Config, precision: str | None) -> None:
    wrapper: ConfigDict = cfg.optim_wrapper
    if precision is not None:
        for key in ("dtype", "loss_scale"):
            wrapper.pop(key, None)
        wrapper["type"] = "OptimWrapper" if precision == "fp32" else "AmpOptimWrapper"
    kind = wrapper.setdefault("type", "OptimWrapper")
    if kind not in ("OptimWrapper", "AmpOptimWrapper"):
        raise ValueError(f"optim_wrapper.type={kind!r}: must be OptimWrapper (fp32) or AmpOptimWrapper (bf16)")
    if kind == "AmpOptimWrapper":
        if wrapper.setdefault("dtype", "bfloat16") != "bfloat16":
            raise ValueError(f"optim_wrapper.dtype={wrapper.dtype!r}: must be bfloat16, which needs no loss scale")
        wrapper["loss_scale"] = 1.0  # no scaling, but steps with a non-finite gradient are skipped
