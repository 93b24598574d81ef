"""Draws what a detector finds: `python -m downstream.detect.draw_detections CONFIG WEIGHTS IMAGES OUT [--score 0.5]`.

CONFIG and WEIGHTS are as for downstream/detect/train_detector.py; for a run, give runs/NAME/config.py and runs/NAME.
IMAGES is an image or a folder. OUT gets a drawing of each under the same name, with boxes, classes and scores, and with
masks if the detector has them.
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
from downstream.dense.mmengine.dataset_keys import class_names, datasets
from downstream.detect.detector_keys import propagate_keys

CONFIGS = Path(__file__).parent / "configs"


def _prepare(score: float, cfg: Any, weights: str, device: torch.device) -> Draw:
    with needs_mm():
        import mmcv
        from mmdet.apis import inference_detector
        from mmdet.registry import DATASETS
        from mmdet.visualization import DetLocalVisualizer
    model = load_model(cfg, weights, "mmdet", device)
    model.cfg = cfg  # where mmdet looks for it
    dataset = next(dataset for _, dataset in datasets(cfg, "test"))
    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = {"classes": class_names(dataset, DATASETS.get(dataset.type)), "palette": "random"}

    def draw(image: np.ndarray, file: str) -> None:
        found = inference_detector(model, image)
        shown = {"draw_gt": False, "pred_score_thr": score, "out_file": file}
        visualizer.add_datasample(Path(file).name, mmcv.bgr2rgb(image), found, **shown)

    return draw


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must be between 0 and 1")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Returns exit code 0, or 1 with one clear error."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--score",
        metavar="S",
        type=_probability,
        default=0.5,
        help="draw detections with at least this score (default 0.5)",
    )
    options = parser.parse_args(arguments)
    prepare = functools.partial(_prepare, options.score)
    return report_errors(lambda: run_draw(options, CONFIGS, propagate_keys, prepare))


if __name__ == "__main__":
    sys.exit(main())
