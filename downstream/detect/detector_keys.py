"""Copies top-level keys of a detection config to wherever mmdet reads them.

The keys are `data_root` and `classes`, as in segmentation, `size`, and `with_masks`.
"""

from collections.abc import Iterator
from typing import Any

from downstream.dense.mmengine.dataset_keys import SPLITS, below_root, datasets, propagate_data_keys


def propagate_keys(cfg: Any) -> None:
    """Fills in data sets, evaluators and the model from an mmengine Config's top-level keys, in place.

    A key that is None changes nothing. Beyond `propagate_data_keys`, evaluators get the annotation file of their data
    set, and:
    `classes`: their number becomes every head's `num_classes`.
    `size`: the side in pixels of the square image that the backbone is built for. It also replaces the old side of
    padded batches, of crops, and of what images are resized to (in training times a random ratio).
    `with_masks`: False means a box detector without a mask head; masks and polygons are neither read nor measured.
    `model.roi_head.mask_head=None` means the same.

    Raises:
        ValueError: `classes` is not a list of different names, `size` is not a multiple of the patch size, or the best
            checkpoint is chosen by masks that are not predicted.
    """
    propagate_data_keys(cfg)
    if cfg.get("classes") is not None:
        for _, head in heads(cfg):
            head.num_classes = len(cfg.classes)
    if cfg.get("size") is not None and "img_size" in cfg.model.backbone:
        _propagate_size(cfg)
    for split in SPLITS:
        for evaluator in evaluators(cfg, split):
            for _, dataset in datasets(cfg, split):
                if "ann_file" in evaluator:
                    evaluator.ann_file = annotation_file(dataset)
    if "roi_head" in cfg.model and (cfg.get("with_masks") is False or not cfg.model.roi_head.get("mask_head")):
        _remove_masks(cfg)


def _propagate_size(cfg: Any) -> None:
    size, patch = cfg.size, cfg.model.backbone.get("patch_size", 1)
    if not isinstance(size, int) or isinstance(size, bool) or size <= 0 or size % patch:
        raise ValueError(
            f"size={size!r}: must be the side of a square, a multiple of {patch} pixels (model.backbone.patch_size)"
        )
    before, cfg.model.backbone.img_size = cfg.model.backbone.img_size, size
    if cfg.model.data_preprocessor.get("pad_size_divisor") == before:
        cfg.model.data_preprocessor.pad_size_divisor = size
    for split in SPLITS:
        for _, dataset in datasets(cfg, split):
            for step in dataset.pipeline:
                for key in ("scale", "crop_size"):
                    if tuple(step.get(key) or ()) == (before, before):
                        step[key] = (size, size)


def _remove_masks(cfg: Any) -> None:
    cfg.with_masks = False
    cfg.model.roi_head.mask_head = cfg.model.roi_head.mask_roi_extractor = None
    for split in SPLITS:
        for _, dataset in datasets(cfg, split):
            for step in dataset.pipeline:
                if step.get("with_mask"):
                    step.with_mask = False
        for evaluator in evaluators(cfg, split):
            if isinstance(evaluator.get("metric"), list | tuple):
                evaluator.metric = [metric for metric in evaluator.metric if metric != "segm"]
    best = ((cfg.get("default_hooks") or {}).get("checkpoint") or {}).get("save_best")
    if best and "segm" in best:
        raise ValueError(
            f"default_hooks.checkpoint.save_best={best}: no masks are predicted (with_masks=false): give coco/bbox_mAP"
        )


def heads(cfg: Any) -> Iterator[tuple[str, Any]]:
    """The heads of an mmdet model that number classes, with their dotted keys; a head may be None or a list."""
    for key in ("bbox_head", "roi_head.bbox_head", "roi_head.mask_head"):
        group, _, name = key.rpartition(".")
        head: Any = ((cfg.model.get(group) or {}) if group else cfg.model).get(name)
        several = isinstance(head, list | tuple)
        for number, one in enumerate(head if several else [head]):
            if one is not None and "num_classes" in one:
                yield f"model.{key}.{number}" if several else f"model.{key}", one


def evaluators(cfg: Any, split: str) -> list[Any]:
    """The metrics of a split as a list; mmengine accepts one or a list."""
    found = cfg.get(f"{split}_evaluator") or []
    return [found] if isinstance(found, dict) else list(found)


def annotation_file(dataset: Any) -> str:
    """The annotation file's path as mmdet resolves it."""
    return below_root(dataset, dataset.ann_file)


def image_folder(dataset: Any) -> str:
    return below_root(dataset, dataset.data_prefix.get("img", ""))
