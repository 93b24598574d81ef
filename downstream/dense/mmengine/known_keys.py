"""Finds the keys that have a meaning although a configuration does not set them.

A key is known if mmengine's Runner, or the class that a group names as its `type`, takes an argument of this name. A
top-level variable that nothing reads is a mistyped key, or one that was resolved when the file was read.
"""

import ast
import difflib
import inspect
import re
from pathlib import Path
from typing import Any

import torch

from downstream.dense.mmengine.dataset_keys import PROPAGATED

# Top-level keys: arguments of mmengine's Runner, and what else the Runner, our commands and `Config` read.
READ = {
    *("model", "train_dataloader", "val_dataloader", "test_dataloader", "train_cfg", "val_cfg", "test_cfg"),
    *("auto_scale_lr", "optim_wrapper", "param_scheduler", "val_evaluator", "test_evaluator", "default_hooks"),
    *("custom_hooks", "data_preprocessor", "load_from", "env_cfg", "log_processor", "log_level", "visualizer"),
    *("default_scope", "randomness", "experiment_name", "compile", "sync_bn", "model_wrapper_cfg"),
    *("efficient_conv_bn_eval", "find_unused_parameters", "custom_imports", "tta_model", "tta_pipeline", "work_dir"),
    *("launcher", "resume", "_base_", *PROPAGATED),
}
_OWNED = {"launcher", "resume", "work_dir", "_base_"}  # those that the command decides

# What takes the keys of groups without a `type`.
_PLAIN: dict[str, Any] = {
    r"(train|val|test)_dataloader": torch.utils.data.DataLoader,
    r".*\.filter_cfg": {"filter_empty_gt": True, "min_size": 0},
    r".*\.data_prefix": {"img": "", "seg": "", "img_path": "", "seg_map_path": ""},
    r"optim_wrapper\.clip_grad": {"max_norm": None, "norm_type": 2.0, "error_if_nonfinite": False},
    r"env_cfg": {"cudnn_benchmark": False, "mp_cfg": None, "resource_limit": 4096},
    r"randomness": {"seed": None, "deterministic": False},
}
# The registries that know the types of the other groups.
_REGISTRIES = {
    r".*\.(sampler|batch_sampler)": "DATA_SAMPLERS",
    r".*_dataloader\.dataset(\.dataset|\.datasets\.\d+)*": "DATASETS",
    r".*pipeline\..*": "TRANSFORMS",
    r"(val|test)_evaluator(\.\d+)?": "METRICS",
    r"(default|custom)_hooks\..*": "HOOKS",
    r"optim_wrapper\.optimizer": "OPTIMIZERS",
    r"optim_wrapper": "OPTIM_WRAPPERS",
    r"param_scheduler\.\d+": "PARAM_SCHEDULERS",
    r"visualizer\.vis_backends\.\d+": "VISBACKENDS",
    r"visualizer": "VISUALIZERS",
    r"(train|val|test)_cfg": "LOOPS",
    r"log_processor": "LOG_PROCESSORS",
    r"model(\..*)?": "MODELS",
}


def known_keys(cfg: Any, path: str, group: Any) -> dict[str, Any]:
    """The keys that a group of a configuration accepts, with their default values.

    Args:
        cfg: the mmengine Config.
        path: of the group, dotted; '' is the top level.
        group: its content.
    """
    if not path:
        return dict.fromkeys(READ - _OWNED)
    for pattern, plain in _PLAIN.items():
        if re.fullmatch(pattern, path):
            return plain if isinstance(plain, dict) else _arguments(plain)
    kind = group.get("type") if isinstance(group, dict) else None
    if isinstance(kind, str):
        for pattern, registry in _REGISTRIES.items():
            if re.fullmatch(pattern, path):
                kind = _find_class(cfg, registry, kind)
                break
    return _arguments(kind) if isinstance(kind, type) else {}


def _find_class(cfg: Any, registry: str, name: str) -> Any:
    import mmengine.registry
    from mmengine.utils import import_modules_from_strings

    import_modules_from_strings(**cfg.get("custom_imports") or {"imports": []})
    with getattr(mmengine.registry, registry).switch_scope_and_registry(cfg.get("default_scope")) as found:
        return found.get(name)


def _arguments(kind: type) -> dict[str, Any]:
    """A class's arguments with their defaults; its base class's too, if it passes on keyword arguments."""
    found: dict[str, Any] = {}
    for base in kind.__mro__[:-1]:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        found = {**{p.name: None if p.default is p.empty else p.default for p in named}, **found}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def check_variables(path: Path) -> None:
    """Raises ValueError if a configuration that inherits another one sets a variable that nothing reads.

    Inherited files are not checked, because one may serve several configurations.
    """
    if path.suffix != ".py":
        return
    tree = ast.parse(path.read_text())
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    names = [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
    loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    if "_base_" not in names:
        return  # a saved configuration has all variables of all files
    for name in names:
        if name not in READ | loaded:
            close = difflib.get_close_matches(name, READ, n=1, cutoff=0.75)
            near = f"did you mean {close[0]}? " if close else ""
            resolved = "Variables of inherited files are already resolved: set the keys that use them"
            raise ValueError(f"{path}: nothing reads {name}: {near}{resolved}")


def explain_variable(cfg: Any, key: str) -> str:
    """What to override instead of a top-level variable, for an error message."""
    name, dot, rest = key.partition(".")
    value = cfg[name]
    places = [place for place in _find_equal(cfg, value) if isinstance(value, list | dict)]
    return f"override {places[0]}{dot}{rest}" if places else "override the keys that use it"


def _find_equal(cfg: Any, value: Any) -> list[str]:
    """The dotted keys with this value, among the top-level keys that are read and below them."""
    found = []
    stack = [(key, cfg[key]) for key in sorted(READ & cfg.keys(), reverse=True)]
    while stack:
        path, tree = stack.pop()
        if tree == value:
            found.append(path)
        elif isinstance(tree, dict):
            stack += [(f"{path}.{key}", inner) for key, inner in tree.items()]
        elif isinstance(tree, list | tuple):
            stack += [(f"{path}.{number}", inner) for number, inner in enumerate(tree)]
    return found
