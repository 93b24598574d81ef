"""What a detection config says once, at its top, put everywhere that mmdet reads it: `data_root` and `classes`."""

import os
from collections.abc import Iterator
from typing import Any

SPLITS = ("train", "val", "test")


def spread_settings(cfg: Any) -> None:
    """Fills in data sets, evaluators and heads from the top of an mmengine Config, in place.

    `data_root` becomes that of every data set, and the evaluators read the annotation file of theirs. `classes`, where
    it is not None, becomes theirs as well, and `num_classes` of both heads its length.

    Raises:
        ValueError: `classes` is no list of names.
    """
    classes = cfg.get("classes")
    if classes is not None:
        if isinstance(classes, str) or not all(isinstance(name, str) for name in classes) or not classes:
            raise ValueError(
                f"""classes={classes!r}: give names in the annotation file's order: classes='["cat", "dog"]'"""
            )
        for head in ("bbox_head", "mask_head"):
            cfg.model.roi_head[head].num_classes = len(classes)
    for split in SPLITS:
        evaluator = cfg.get(f"{split}_evaluator")
        for _, dataset in datasets(cfg, split):
            if cfg.get("data_root") is not None:
                dataset.data_root = cfg.data_root
            if classes is not None:
                dataset.metainfo = {"classes": tuple(classes)}
            if evaluator is not None and "ann_file" in evaluator:
                evaluator.ann_file = annotation_file(dataset)


def datasets(cfg: Any, split: str) -> Iterator[tuple[str, Any]]:
    """The data sets of a split with their dotted keys; of wrappers, what they wrap."""
    loader = cfg.get(f"{split}_dataloader")
    if loader is not None:
        yield from _unwrap(f"{split}_dataloader.dataset", loader.dataset)


def _unwrap(key: str, dataset: Any) -> Iterator[tuple[str, Any]]:
    if "dataset" in dataset:
        yield from _unwrap(f"{key}.dataset", dataset.dataset)
    elif "datasets" in dataset:
        for number, one in enumerate(dataset.datasets):
            yield from _unwrap(f"{key}.datasets.{number}", one)
    else:
        yield key, dataset


def annotation_file(dataset: Any) -> str:
    """Its path as mmdet finds it: beside the root, unless it is absolute."""
    return os.path.join(dataset.get("data_root") or "", dataset.ann_file)


def image_folder(dataset: Any) -> str:
    return os.path.join(dataset.get("data_root") or "", dataset.data_prefix.get("img", ""))


def class_names(dataset: Any, kind: Any) -> tuple[str, ...]:
    """What the heads' numbers mean: the data set's own names, or those of its type, a class of mmdet."""
    return tuple((dataset.get("metainfo") or {}).get("classes") or kind.METAINFO["classes"])
