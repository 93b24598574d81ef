"""Checks of detection and segmentation before a model is built: mmcv's compiled operators, and files."""

import contextlib
import importlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from downstream.dense.mmengine.dataset_keys import datasets

SHOWN_NAMES = 5
TRANSPOSED = {5, 6, 7, 8}  # EXIF orientations that swap height and width, which mmcv's decoder applies


def check_datasets(cfg: Any, splits: Sequence[str], check: Callable[[str, Any, str], str]) -> list[str]:
    """Checks each data set; returns a line about each.

    Args:
        cfg: an mmengine Config.
        splits: any of train, val and test.
        check: (dotted key, data set, split) -> the line. It raises ValueError where something is wrong.

    Raises:
        ValueError: one line for each data set in which something is wrong.
    """
    check_ops()
    lines, problems = [], []
    for split in splits:
        for key, dataset in datasets(cfg, split):
            try:
                lines.append(f"{key}: {check(key, dataset, split)}")
            except ValueError as error:
                problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return lines


@contextlib.contextmanager
def needs_mm() -> Iterator[None]:
    """Around imports of mmengine, mmdet or mmseg: a ValueError of one sentence where one of them is not installed.

    What they print is not shown, and from then on neither are warnings of theirs and of torch: they are about their own
    calls of functions that will change, and optional packages.
    """
    warnings.filterwarnings("ignore", module=r"(mmcv|mmdet|mmengine|mmseg|torch)(\.|$)")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, which mmengine imports, warns that it chose it
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error}: `python -m downstream.doctor` says how to install what detection and segmentation need"
        ) from None


def check_ops() -> None:
    """Raises ValueError where mmcv has no compiled operators, or operators that were built for another torch."""
    try:
        importlib.import_module("mmcv._ext")
    except ImportError as error:
        raise ValueError(
            f"mmcv's compiled operators cannot be loaded ({error}): python -m downstream.doctor says how to fix it"
        ) from None


def find_missing(folder: str, names: Iterable[str]) -> list[str]:
    """Those of `names`, paths below `folder`, that do not exist; each folder is listed once, no file is opened."""
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
    """Whether it is a path on this machine, and not a URL (s3://...), which is not checked."""
    return "://" not in path


def check_exists(key: str, path: str, kind: str) -> None:
    """Raises ValueError where `path`, the value of `key` in the configuration, is not a file (or folder)."""
    found = Path(path).is_file() if kind == "file" else Path(path).is_dir()
    if not found:
        nearest = next((str(parent) for parent in Path(path).parents if parent.is_dir()), "/")
        raise ValueError(f"{key}: no {kind} {path} ({nearest} exists)")


def read_image_size(key: str, path: str, oriented: bool = True) -> tuple[int, int]:
    """(height, width) after mmcv's decoder, from the file's header.

    Args:
        key: of the data set, for messages.
        path: of the image.
        oriented: whether the decoder applies the EXIF orientation, as of `applies_orientation`.

    Raises:
        ValueError: it is not an image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            transposed = oriented and image.getexif().get(0x0112) in TRANSPOSED
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{key}: {path} cannot be read as an image: {error}") from None
    return (width, height) if transposed else (height, width)


def applies_orientation(pipeline: Any) -> bool:
    """Whether the step of a pipeline that reads images turns them as their EXIF orientation says."""
    loading: dict[str, Any] = next((step for step in pipeline if step.type.endswith("LoadImageFromFile")), {})
    color, decoder = loading.get("color_type", "color"), loading.get("imdecode_backend", "cv2")
    return color in ("color", "grayscale") and decoder in ("cv2", "pillow")
