"""Draws what a detector finds: `python -m downstream.detect.draw CONFIG WEIGHTS IMAGES OUT [--score 0.5]`.

CONFIG and WEIGHTS are those of downstream/detect/run.py; of a training, WORK_DIR/config.py and WORK_DIR. IMAGES is one
image or a folder; OUT gets a picture of the same name for each, with masks, boxes, classes and scores.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import mmcv
import torch
from mmdet.apis import inference_detector
from mmdet.registry import DATASETS, MODELS
from mmdet.visualization import DetLocalVisualizer
from mmengine.registry import init_default_scope
from mmengine.runner import CheckpointLoader
from mmengine.utils import import_modules_from_strings
from torch import nn
from tqdm import tqdm

from data.command import report_errors
from data.scan import IMAGE_EXTENSIONS
from downstream.dense.checks import check_ops, first_names
from downstream.dense.command import load
from downstream.dense.files import find_weights, refuse_pickles
from downstream.detect.settings import class_names, datasets, spread_settings

CONFIGS = Path(__file__).parent / "configs"


def load_detector(cfg: Any, weights: str, device: torch.device) -> nn.Module:
    """The detector of an mmengine Config with these weights, in eval mode; it keeps its `cfg`, as mmdet wants.

    Raises:
        ValueError: the file is damaged, holds more than weights, or is of another detector.
    """
    refuse_pickles()
    import_modules_from_strings(**cfg.get("custom_imports") or {"imports": []})
    init_default_scope("mmdet")
    cfg.model.backbone.checkpoint = None  # the weights are those of the whole detector
    model: nn.Module = MODELS.build(cfg.model)
    content = CheckpointLoader.load_checkpoint(weights, map_location="cpu")
    tensors = content.get("state_dict", content) if isinstance(content, dict) else {}
    try:
        model.load_state_dict(tensors)
    except (RuntimeError, AttributeError, TypeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{weights} is of another detector than the configuration: {said[:300]}") from None
    model.cfg = cfg
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


def _run(options: argparse.Namespace) -> int:
    check_ops()
    out: Path = options.out
    if out.resolve() == (options.images if options.images.is_dir() else options.images.parent).resolve():
        raise ValueError(f"{out} is where the images are: give another folder for the drawn ones")
    cfg = load(options.config, [], CONFIGS, spread_settings).cfg
    images = find_images(options.images)
    model = load_detector(cfg, find_weights(options.weights), _device())
    dataset = next(dataset for _, dataset in datasets(cfg, "test"))
    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = {"classes": class_names(dataset, DATASETS.get(dataset.type)), "palette": "random"}
    unreadable = []
    for path, place in tqdm(images, desc="drawing", unit=" images", disable=None):
        image = mmcv.imread(str(path)) if path.stat().st_size else None
        if image is None:
            unreadable.append(str(path))
            continue
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        found = inference_detector(model, image)
        shown = {"draw_gt": False, "pred_score_thr": options.score, "out_file": str(out / place)}
        visualizer.add_datasample(place.name, mmcv.bgr2rgb(image), found, **shown)
    if unreadable:
        print(f"{len(unreadable)} images cannot be decoded: {first_names(unreadable)}", file=sys.stderr)
    if len(unreadable) == len(images):
        raise ValueError(f"{options.images}: no image that can be decoded")
    print(f"{len(images) - len(unreadable)} pictures in {out}")
    return 0


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("between 0 and 1")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 1 and one clear error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("weights", metavar="WEIGHTS")
    parser.add_argument("images", metavar="IMAGES", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument(
        "--score", metavar="S", type=_share, default=0.5, help="draw what has at least this (default 0.5)"
    )
    return report_errors(functools.partial(_run, parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
