"""Checks for detection and segmentation before a model is built: mmcv's compiled operators, and files."""

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
    """Checks each data set and returns a line about each.

    Args:
        cfg: an mmengine Config.
        splits: any of train, val and test.
        check: (dotted key, data set, split) -> the line. It raises ValueError if something is wrong.

    Raises:
        ValueError: one line for each data set with a problem.
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
    """Wraps imports of mmengine, mmdet or mmseg; a missing library raises a one-sentence ValueError.

    Output of the imports is hidden. Warnings of these libraries and of torch stay hidden from then on: they concern the
    libraries' own use of deprecated functions, and optional packages.
    """
    warnings.filterwarnings("ignore", module=r"(mmcv|mmdet|mmengine|mmseg|torch)(\.|$)")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # mmengine imports DeepSpeed, which warns if it must choose
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error}: `python -m downstream.doctor` says how to install what detection and segmentation need"
        ) from None


def check_ops() -> None:
    """Raises ValueError if mmcv has no compiled operators, or if they were built for another torch."""
    try:
        importlib.import_module("mmcv._ext")
    except ImportError as error:
        raise ValueError(
            f"mmcv's compiled operators cannot be loaded ({error}): python -m downstream.doctor says how to fix it"
        ) from None


def find_missing(folder: str, names: Iterable[str]) -> list[str]:
    """The `names` (paths below `folder`) that do not exist; lists each folder once and opens no file."""
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
    """Whether it is a local path, not a URL (s3://...); URLs are not checked."""
    return "://" not in path


def check_exists(key: str, path: str, kind: str) -> None:
    """Raises ValueError if `path`, the value of `key` in the configuration, is not a file (or folder)."""
    found = Path(path).is_file() if kind == "file" else Path(path).is_dir()
    if not found:
        nearest = next((str(parent) for parent in Path(path).parents if parent.is_dir()), "/")
        raise ValueError(f"{key}: no {kind} {path} ({nearest} exists)")


def read_image_size(key: str, path: str, oriented: bool = True) -> tuple[int, int]:
    """(height, width) as mmcv's decoder returns them, read from the file's header.

    Args:
        key: of the data set, for messages.
        path: of the image.
        oriented: whether the decoder applies the EXIF orientation; see `applies_orientation`.

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
    """Whether the image-reading step of a pipeline applies the EXIF orientation."""
    loading: dict[str, Any] = next((step for step in pipeline if step.type.endswith("LoadImageFromFile")), {})
    color, decoder = loading.get("color_type", "color"), loading.get("imdecode_backend", "cv2")
    return color in ("color", "grayscale") and decoder in ("cv2", "pillow")
