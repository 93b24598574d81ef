"""The command line of trainings on mmengine: a configuration, changes to it, and the words that are ours."""

import ast
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict, utils

from pretrain.trainer.schema import nearest

# mmengine looks for a package of the original name where a configuration inherits "mmseg::...".
utils.MODULE2PACKAGE["mmseg"] = "onedl-mmsegmentation"

# And for each inherited file it parses an index of all models that the package has.
utils.load = functools.cache(utils.load)

WORDS = ("checkpoint", "engine", "precision", "resume", "test", "tta")

# Keys of mmengine that every configuration may set, whether it names them or not.
_DEFAULTS = {
    "load_from": None,
    "randomness": {"seed": 0},
    "find_unused_parameters": False,
    "auto_scale_lr": {"enable": False},
    "optim_wrapper": {"accumulative_counts": 1, "clip_grad": None},
    "default_hooks": {"checkpoint": {"type": "CheckpointHook", "interval": 1, "max_keep_ckpts": -1}},
}


@dataclass
class Job:
    """What a command asks for.

    Attributes:
        cfg: the configuration with all changes.
        engine: a file of DeepSpeed's keys; None is the plain Runner.
        resume: whether what `work_dir` holds is continued.
        test: a checkpoint to evaluate instead of training.
        tta: whether it is evaluated on augmented images as well, by the configuration's `tta_model`.
    """

    cfg: Config
    engine: str | None
    resume: bool
    test: str | None
    tta: bool = False


def load(name: str, changes: list[str], configs: Path, spread: Callable[[Config], None]) -> Job:
    """A configuration, by path or by the name of one in the folder `configs`, with `KEY=value` changes.

    `spread` then puts what the configuration says once wherever else it belongs; there it is not to be changed.

    Beside the configuration's own keys there are: `checkpoint=FILE` (short for model.backbone.checkpoint),
    `engine=zero1|zero2|zero3|FILE`, `precision=fp32|bf16`, `resume=false`, `test=FILE` and `tta=true`.

    Raises:
        ValueError: no such configuration or key, or a value of another type than the configuration's.
    """
    cfg = _read(_find(name, configs))
    for key, value in _DEFAULTS.items():
        _set_default(cfg, key, value)
    if not cfg.get("work_dir"):
        cfg.work_dir = f"runs/{Path(name).stem}"
    words: dict[str, Any] = {}
    changed: dict[str, Any] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key or key.startswith("-"):
            raise ValueError(f"{change!r} is not a change: write KEY=value, for example train_cfg.max_epochs=25")
        if key in WORDS:
            words[key] = _value(text)
        else:
            changed[key] = _value(text)
            _change(cfg, key, changed[key])
    if "checkpoint" in words:
        _change(cfg, "model.backbone.checkpoint", words["checkpoint"])
    _set_precision(cfg, words.get("precision"))
    spread(cfg)
    _check_spread(cfg, changed)
    resume = words.get("resume", True)
    if not isinstance(resume, bool):
        raise ValueError(f"resume={resume!r}: true continues what work_dir holds, which is done unless false is said")
    if words.get("tta", False) not in (True, False) or (words.get("tta") and not words.get("test")):
        raise ValueError(f"tta={words['tta']!r}: true evaluates test=FILE on augmented images as well")
    return Job(cfg, _engine_file(words.get("engine")), resume, words.get("test"), words.get("tta", False))


def _find(name: str, configs: Path) -> Path:
    for path in (Path(name), configs / name, configs / f"{name}.py"):
        if path.is_file():
            return path
    names = sorted(p.stem for p in configs.glob("*.py") if not p.stem.startswith("_"))
    raise ValueError(f"no configuration {name!r}: neither a file nor a shipped one; {nearest(Path(name).stem, names)}")


def _read(path: Path) -> Config:
    try:
        # What it imports comes later: DeepSpeed's accelerator is not decided yet.
        return Config.fromfile(path, import_custom_modules=False)
    except Exception as error:  # whatever its Python raises
        raise ValueError(f"{path} is no configuration that mmengine reads: {type(error).__name__}: {error}") from None


def _set_default(tree: Any, key: str, value: Any) -> None:
    if key not in tree or (isinstance(value, dict) and tree[key] is None):
        tree[key] = value
    elif isinstance(value, dict):
        for inner, default in value.items():
            _set_default(tree[key], inner, default)


def _value(text: str) -> Any:
    """Python's literals, and the words that YAML has for some of them."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _place(cfg: Config, key: str) -> tuple[Any, Any]:
    """What holds the value of a dotted key, and the last step to it."""
    *above, last = key.split(".")
    tree: Any = cfg
    for depth, part in enumerate([*above, last]):
        keys = [str(n) for n in range(len(tree))] if isinstance(tree, list) else list(map(str, tree))
        if part not in keys:
            place = ".".join([*above, last][:depth])
            raise ValueError(f"unknown key {key}: {f'in {place}, ' if place else ''}{nearest(part, keys)}")
        step = int(part) if isinstance(tree, list) else part
        if depth < len(above):
            tree = tree[step]
            if not isinstance(tree, dict | list):
                raise ValueError(f"unknown key {key}: {'.'.join(above[: depth + 1])} is a value, {tree!r}")
    return tree, step


def _change(cfg: Config, key: str, value: Any) -> None:
    tree, step = _place(cfg, key)
    if wrong := _wrong_type(tree[step], value):
        raise ValueError(f"{key}={value!r}: {wrong}")
    tree[step] = value


def _check_spread(cfg: Config, changed: dict[str, Any]) -> None:
    """Raises ValueError where a change was overwritten by what stands once, at the configuration's top."""
    for key, value in changed.items():
        tree, step = _place(cfg, key)
        if tree[step] != value:
            raise ValueError(
                f"{key}={value!r}: the configuration puts {_short(tree[step])} there, from a key at its top: "
                f"change that one"
            )


def _wrong_type(old: Any, new: Any) -> str | None:
    kinds: list[tuple[tuple[type, ...], str]] = [
        ((bool,), "true or false"),
        ((int, float), "a number"),
        ((dict,), "a group of keys: change one of them"),
        ((list, tuple), "a list"),
        ((str,), "a word"),
    ]
    for types, words in kinds:
        if isinstance(old, types):
            fits = isinstance(new, types) and (bool in types or not isinstance(new, bool))
            return None if fits or new is None else f"it is {words} in the configuration ({_short(old)})"
    return None  # it was None: anything may stand there


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def _engine_file(engine: Any) -> str | None:
    if engine is None:
        return None
    shipped = Path(__file__).parents[2] / "ds_configs" / f"{engine}.json"
    return str(shipped) if shipped.is_file() else str(engine)


def _set_precision(cfg: Config, precision: str | None) -> None:
    if precision not in (None, "fp32", "bf16"):
        raise ValueError(f"precision={precision!r}: fp32 or bf16")
    wrapper: ConfigDict = cfg.optim_wrapper
    if precision is not None:
        for key in ("dtype", "loss_scale"):
            wrapper.pop(key, None)
        wrapper["type"] = "OptimWrapper" if precision == "fp32" else "AmpOptimWrapper"
    kind = wrapper.setdefault("type", "OptimWrapper")
    if kind not in ("OptimWrapper", "AmpOptimWrapper"):
        raise ValueError(f"optim_wrapper.type={kind!r}: OptimWrapper (fp32) or AmpOptimWrapper (bf16)")
    if kind == "AmpOptimWrapper":
        if wrapper.setdefault("dtype", "bfloat16") != "bfloat16":
            raise ValueError(f"optim_wrapper.dtype={wrapper.dtype!r}: only bfloat16, which needs no loss scale")
        wrapper["loss_scale"] = 1.0  # no scaling; but a gradient that is not finite refuses the step
