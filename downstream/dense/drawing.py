"""What the commands that draw predictions on images share.

mmengine and mmcv are imported only when needed, so that a command can report what is missing.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from data.scan import IMAGE_EXTENSIONS
from downstream.dense.data_checks import check_ops, first_names, needs_mm
from downstream.dense.mmengine.encoder_start import clear_start

Draw = Callable[[np.ndarray, str], None]


def load_model(cfg: Any, weights: str, scope: str, device: torch.device) -> nn.Module:
    """The model of an mmengine Config with these weights, in eval mode.

    Args:
        cfg: modified so that no encoder is loaded.
        weights: a file.
        scope: `mmdet` or `mmseg`.
        device: of the model.

    Raises:
        ValueError: the file is damaged, holds more than weights, or its weights belong to another model.
    """
    from mmengine.registry import MODELS, init_default_scope
    from mmengine.runner.checkpoint import CheckpointLoader
    from mmengine.utils import import_modules_from_strings

    from downstream.dense.mmengine.checkpoint_files import refuse_pickles

    refuse_pickles()
    import_modules_from_strings(**cfg.get("custom_imports") or {"imports": []})
    init_default_scope(scope)
    clear_start(cfg)  # the file has the weights of the whole model
    model: nn.Module = MODELS.build(cfg.model)
    content = CheckpointLoader.load_checkpoint(weights, map_location="cpu")
    tensors = content.get("state_dict", content) if isinstance(content, dict) else {}
    try:
        model.load_state_dict(tensors)
    except (RuntimeError, AttributeError, TypeError) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{weights} does not match the configured model: {message[:300]}") from None
    return model.to(device).eval()


def find_images(path: Path) -> list[tuple[Path, Path]]:
    """Each image and its path relative to the output folder.

    Raises:
        ValueError: there is no image.
    """
    if path.is_file():
        return [(path, Path(path.name))]
    if not path.is_dir():
        raise ValueError(f"no image or folder {path}")
    images = sorted(file for file in path.rglob("*") if file.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS)
    if not images:
        raise ValueError(f"{path} contains no images ({', '.join(IMAGE_EXTENSIONS)})")
    return [(file, file.relative_to(path)) for file in images]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of `CONFIG WEIGHTS IMAGES OUT`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("weights", metavar="WEIGHTS")
    parser.add_argument("images", metavar="IMAGES", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    return parser


def run_draw(
    options: argparse.Namespace,
    configs: Path,
    propagate: Callable[[Any], None],
    prepare: Callable[[Any, str, torch.device], Draw],
) -> int:
    """Runs the whole command with the given drawing function.

    Args:
        options: of `make_parser`.
        configs, propagate: see `downstream.dense.mmengine.config_file.load_job`.
        prepare: (configuration, weights file, device) -> a function that takes an image, (H, W, 3) uint8 in BGR, and
            the file to write the drawn image to.

    Returns:
        The exit code.

    Raises:
        ValueError: the configuration, the weights or the images cannot be used.
    """
    check_ops()
    with needs_mm():
        import mmcv

        from downstream.dense.mmengine.checkpoint_files import find_weights
        from downstream.dense.mmengine.config_file import load_job
    out: Path = options.out
    if out.resolve() == (options.images if options.images.is_dir() else options.images.parent).resolve():
        raise ValueError(f"{out} is where the images are: give another folder for the drawn images")
    cfg = load_job(options.config, [], configs, propagate).cfg
    images = find_images(options.images)
    draw = prepare(cfg, find_weights(options.weights), _device())
    unreadable = []
    for path, relative in tqdm(images, desc="drawing", unit=" images", disable=None):
        image = mmcv.imread(str(path)) if path.stat().st_size else None
        if image is None:
            unreadable.append(str(path))
            continue
        (out / relative).parent.mkdir(parents=True, exist_ok=True)
        draw(image, str(out / relative))
    if unreadable:
        print(f"{len(unreadable)} images cannot be decoded: {first_names(unreadable)}", file=sys.stderr)
    if len(unreadable) == len(images):
        raise ValueError(f"{options.images}: none of the images can be decoded")
    print(f"{len(images) - len(unreadable)} drawings written to {out}")
    return 0


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
