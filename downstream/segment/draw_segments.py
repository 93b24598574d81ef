"""Draws predictions: `python -m downstream.segment.draw_segments CONFIG WEIGHTS IMAGES OUT [--opacity 0.6]`.

CONFIG and WEIGHTS are as for downstream/segment/train_segmentor.py; for a run, give runs/NAME/config.py and runs/NAME.
IMAGES is an image or a folder. OUT gets a drawing of each under the same name, with a color and a name for each class.
Images are resized and cut into windows as the configuration does for testing.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.parallel import report_errors
from downstream.dense.data_checks import needs_mm
from downstream.dense.drawing import Draw, load_model, make_parser, run_draw
from downstream.dense.mmengine.dataset_keys import datasets
from downstream.segment.segmentor_keys import propagate_keys

CONFIGS = Path(__file__).parent / "configs"


def _prepare(opacity: float, cfg: Any, weights: str, device: torch.device) -> Draw:
    with needs_mm():
        import mmcv
        from mmengine.dataset import Compose
        from mmseg.registry import DATASETS
        from mmseg.visualization import SegLocalVisualizer
    model: Any = load_model(cfg, weights, "mmseg", device)
    dataset = next(dataset for _, dataset in datasets(cfg, "test"))
    steps = [step for step in dataset.pipeline if not step.type.startswith("Load")]
    pipeline = Compose([{"type": "LoadImageFromNDArray"}, *steps])
    visualizer = SegLocalVisualizer(alpha=opacity)
    visualizer.dataset_meta = DATASETS.build({**dataset, "pipeline": [], "lazy_init": True}).metainfo

    @torch.no_grad()
    def draw(image: np.ndarray, file: str) -> None:
        data = pipeline({"img": image})
        (found,) = model.test_step({"inputs": [data["inputs"]], "data_samples": [data["data_samples"]]})
        visualizer.add_datasample(Path(file).name, mmcv.bgr2rgb(image), found, draw_gt=False, out_file=file)

    return draw


def _opacity(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError("must be above 0, at most 1")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Returns exit code 0, or 1 with one clear error."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--opacity", metavar="A", type=_opacity, default=0.6, help="opacity of the colors (default 0.6)"
    )
    options = parser.parse_args(arguments)
    prepare = functools.partial(_prepare, options.opacity)
    return report_errors(lambda: run_draw(options, CONFIGS, propagate_keys, prepare))


if __name__ == "__main__":
    sys.exit(main())
