"""Copies `data_root` and `classes` from the top of a detection config to wherever mmdet reads them."""

from typing import Any

from downstream.dense.mmengine.dataset_keys import SPLITS, below_root, datasets, propagate_data_keys


def propagate_keys(cfg: Any) -> None:
    """Fills in data sets, evaluators and heads from the top of an mmengine Config, in place.

    As `propagate_data_keys`; the evaluators also read the annotation file of their data set, and `num_classes` of both
    heads becomes the length of `classes`, where that is not None.

    Raises:
        ValueError: `classes` is not a list of different names.
    """
    propagate_data_keys(cfg)
    if cfg.get("classes") is not None:
        for head in ("bbox_head", "mask_head"):
            cfg.model.roi_head[head].num_classes = len(cfg.classes)
    for split in SPLITS:
        evaluator = cfg.get(f"{split}_evaluator")
        for _, dataset in datasets(cfg, split):
            if evaluator is not None and "ann_file" in evaluator:
                evaluator.ann_file = annotation_file(dataset)


def annotation_file(dataset: Any) -> str:
    """Its path as mmdet resolves it."""
    return below_root(dataset, dataset.ann_file)


def image_folder(dataset: Any) -> str:
    return below_root(dataset, dataset.data_prefix.get("img", ""))
