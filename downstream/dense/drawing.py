"""What the commands that draw predictions on images share."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.utils import import_modules_from_strings
from torch import nn
from tqdm import tqdm

from data.scan import IMAGE_EXTENSIONS
from downstream.dense.data_checks import check_ops, first_names
from downstream.dense.mmengine.checkpoint_files import find_weights, refuse_pickles
from downstream.dense.mmengine.config_file import load

Draw = Callable[[np.ndarray, str], None]


def load_model(cfg: Any, weights: str, scope: str, device: torch.device) -> nn.Module:
    """The model of an mmengine Config with these weights, in eval mode.

    Args:
        cfg: changed: its backbone starts from nothing.
        weights: a file.
        scope: `mmdet` or `mmseg`.
        device: where it shall be.

    Raises:
        ValueError: the file is damaged, holds more than weights, or is of another model.
    """
    refuse_pickles()
    import_modules_from_strings(**cfg.get("custom_imports") or {"imports": []})
    init_default_scope(scope)
    cfg.model.backbone.checkpoint = None  # the weights are those of the whole model
    model: nn.Module = MODELS.build(cfg.model)
    content = CheckpointLoader.load_checkpoint(weights, map_location="cpu")
    tensors = content.get("state_dict", content) if isinstance(content, dict) else {}
    try:
        model.load_state_dict(tensors)
    except (RuntimeError, AttributeError, TypeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{weights} is of another model than the configuration: {said[:300]}") from None
    return model.to(device).eval()


def find_images(given: Path) -> list[tuple[Path, Path]]:
    """Each image and its place below the output folder.

    Raises:
        ValueError: there is none.
    """
    if given.is_file():
        return [(given, Path(given.name))]
    if not given.is_dir():
        raise ValueError(f"no image or folder {given}")
    found = sorted(path for path in given.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS)
    if not found:
        raise ValueError(f"{given}: no images ({', '.join(IMAGE_EXTENSIONS)}) in it")
    return [(path, path.relative_to(given)) for path in found]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Of `CONFIG WEIGHTS IMAGES OUT`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("weights", metavar="WEIGHTS")
    parser.add_argument("images", metavar="IMAGES", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    return parser


def run_draw(
    options: argparse.Namespace,
    configs: Path,
    spread: Callable[[Any], None],
    prepare: Callable[[Any, str, torch.device], Draw],
) -> int:
    """The whole command, but for what draws.

    Args:
        options: of `make_parser`.
        configs, spread: as of `downstream.dense.mmengine.config_file.load`.
        prepare: (configuration, file of weights, device) -> what takes an image, (H, W, 3) uint8 in BGR, and the file
            into which it is drawn.

    Returns:
        The exit code.

    Raises:
        ValueError: settings, weights or images that are not what they should be.
    """
    check_ops()
    out: Path = options.out
    if out.resolve() == (options.images if options.images.is_dir() else options.images.parent).resolve():
        raise ValueError(f"{out} is where the images are: give another folder for the drawn ones")
    cfg = load(options.config, [], configs, spread).cfg
    images = find_images(options.images)
    draw = prepare(cfg, find_weights(options.weights), _device())
    unreadable = []
    for path, place in tqdm(images, desc="drawing", unit=" images", disable=None):
        image = mmcv.imread(str(path)) if path.stat().st_size else None
        if image is None:
            unreadable.append(str(path))
            continue
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        draw(image, str(out / place))
    if unreadable:
        print(f"{len(unreadable)} images cannot be decoded: {first_names(unreadable)}", file=sys.stderr)
    if len(unreadable) == len(images):
        raise ValueError(f"{options.images}: no image that can be decoded")
    print(f"{len(images) - len(unreadable)} pictures in {out}")
    return 0


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
