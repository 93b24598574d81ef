"""What detection and segmentation check before a model is built: mmcv's compiled operators, and files."""

import importlib
import os
from collections.abc import Iterable
from pathlib import Path

SHOWN_NAMES = 5


def check_ops() -> None:
    """Raises ValueError where mmcv has no compiled operators, or ones that were built for another torch."""
    try:
        importlib.import_module("mmcv._ext")
    except ImportError as error:
        raise ValueError(
            f"mmcv's compiled operators cannot be loaded ({error}): python -m downstream.doctor says how to mend it"
        ) from None


def find_missing(folder: str, names: Iterable[str]) -> list[str]:
    """Those of `names`, paths below `folder`, that are not there; each folder is listed once, no file is looked at."""
    listed: dict[str, set[str]] = {}
    missing = []
    for name in names:
        parent, base = os.path.split(os.path.join(folder, name))
        if parent not in listed:
            listed[parent] = set(os.listdir(parent)) if os.path.isdir(parent) else set()
        if base not in listed[parent]:
            missing.append(name)
    return missing


def first_names(names: list[str]) -> str:
    """'a, b, c and 7 more'"""
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def is_local(path: str) -> bool:
    """Whether it is a path of this machine's, not an address of a store (s3://...), of which nothing is checked."""
    return "://" not in path


def check_exists(key: str, path: str, kind: str) -> None:
    """Raises ValueError where `path`, which the config gives as `key`, is no file (or folder)."""
    found = Path(path).is_file() if kind == "file" else Path(path).is_dir()
    if not found:
        nearest = next((str(parent) for parent in Path(path).parents if parent.is_dir()), "/")
        raise ValueError(f"{key}: no {kind} {path} ({nearest} is there)")
