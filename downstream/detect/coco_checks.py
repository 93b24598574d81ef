"""Checks the data of a detection config by its annotation files, in seconds, before any model is built.

What would make mmdet fail in the middle of an epoch is an error here; what it would skip silently is counted.
"""

import functools
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS

from downstream.dense.data_checks import (
    check_datasets,
    check_exists,
    find_missing,
    first_names,
    is_local,
    read_image_size,
)
from downstream.dense.mmengine.dataset_keys import class_names
from downstream.detect.coco_boxes import BoxCounts, count_boxes
from downstream.detect.detector_keys import annotation_file, image_folder

OPENED_IMAGES = 16
REQUIRED = {"images": ("id", "file_name", "height", "width"), "categories": ("id", "name"), "annotations": ("id",)}


@dataclass(frozen=True)
class Annotations:
    """The lists of a file in COCO's format, its path, and the key of the data set that names it."""

    key: str
    path: str
    images: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    annotations: list[dict[str, Any]]


def check(cfg: Any, splits: Sequence[str] = ("train", "val")) -> list[str]:
    """Checks each data set; returns a line about each.

    Args:
        cfg: an mmengine Config.
        splits: any of train, val and test.

    Raises:
        ValueError: something is wrong; one line for each data set, with the file and the key to change.
    """
    return check_datasets(cfg, splits, functools.partial(_check_dataset, cfg))


def _check_dataset(cfg: Any, key: str, dataset: Any, split: str) -> str:
    kind = DATASETS.get(dataset.type)
    if kind is None or not issubclass(kind, CocoDataset):
        return f"a {dataset.type} is not checked"
    path, folder = annotation_file(dataset), image_folder(dataset)
    if not is_local(path):
        return f"{path} is not on this machine and is not checked"
    found = read_annotations(key, path)
    classes = class_names(dataset, kind)
    check_classes(found, classes)
    check_heads(cfg, key, classes)
    if split != "train":
        _check_evaluator(cfg, split, path)
    _check_images(found, folder)
    counts = count_boxes(found.images, found.annotations, _category_ids(found, classes))
    _check_boxes(dataset, found, counts)
    return _check_used(cfg, dataset, found, counts) if split == "train" else _describe(found, counts, len(found.images))


def read_annotations(key: str, path: str) -> Annotations:
    """Raises ValueError where there is no such file, or it is not in COCO's format, empty or inconsistent."""
    check_exists(f"{key}.ann_file", path, "file")
    try:
        with open(path) as file:
            content = json.load(file)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{key}.ann_file: {path} is not JSON, or is truncated: {error}") from None
    for name, fields in REQUIRED.items():
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"{key}.ann_file: {path} has no {name}: is it a file of instances in COCO's format?")
        incomplete = next((e for e in entries if not isinstance(e, dict) or any(f not in e for f in fields)), None)
        if incomplete is not None:
            raise ValueError(
                f"{key}.ann_file: {path}: one of {name} lacks one of {', '.join(fields)}: {str(incomplete)[:100]}"
            )
        repeated = [str(number) for number, times in Counter(e["id"] for e in entries).items() if times > 1]
        if repeated:
            raise ValueError(f"{key}.ann_file: {path}: {name} share the id {first_names(repeated)}: renumber them")
    return Annotations(key, path, content["images"], content["categories"], content["annotations"])


def check_classes(found: Annotations, classes: tuple[str, ...]) -> None:
    """Compares the classes with the categories of the file, by whose order mmdet numbers them.

    Raises:
        ValueError: a number would mean another class in the file than in the config.
    """
    names = [category["name"] for category in found.categories]
    present = [name for name in names if name in classes]
    if tuple(present) == classes:
        return
    fix = f"give classes='{json.dumps(names)}'" if len(names) <= 20 else "name its categories in classes, in its order"
    absent = [name for name in classes if name not in names]
    if absent:
        problem = f"has {len(names)} categories ({first_names(names)}), not the classes {first_names(absent)}"
    elif len(set(names)) < len(names):
        problem = "gives two categories the same name"
        fix = "rename one"
    else:
        problem = f"has the order {first_names(present)}, the classes {first_names(list(classes))}"
    raise ValueError(f"{found.key}: {found.path} {problem}: {fix}")


def check_heads(cfg: Any, key: str, classes: tuple[str, ...]) -> None:
    """Raises ValueError where a head predicts another number of classes than the data set has."""
    for name in ("bbox_head", "mask_head"):
        head = cfg.model.roi_head.get(name)
        if head is not None and head.num_classes != len(classes):
            raise ValueError(
                f"model.roi_head.{name}.num_classes={head.num_classes}, but {key} has {len(classes)} classes "
                f"({first_names(list(classes))}): name them in classes, from which both heads take their number"
            )


def _category_ids(found: Annotations, classes: tuple[str, ...]) -> set[int]:
    return {category["id"] for category in found.categories if category["name"] in classes}


def _check_evaluator(cfg: Any, split: str, path: str) -> None:
    evaluator = cfg.get(f"{split}_evaluator") or {}
    file = evaluator.get("ann_file")
    if file is not None and os.path.abspath(file) != os.path.abspath(path):
        raise ValueError(f"{split}_evaluator.ann_file={file} is not the file of {split}_dataloader, {path}")


def _check_images(found: Annotations, folder: str) -> None:
    check_exists(f"{found.key}.data_prefix.img", folder, "folder")
    missing = find_missing(folder, (image["file_name"] for image in found.images))
    if missing:
        raise ValueError(
            f"{found.key}: {len(missing)} of the {len(found.images)} images of {found.path} are not in {folder}: "
            f"{first_names(missing)}; is data_prefix.img right, and everything unpacked?"
        )
    for image in found.images[:: max(len(found.images) // OPENED_IMAGES, 1)]:
        path = os.path.join(folder, image["file_name"])
        height, width = read_image_size(found.key, path)
        if (width, height) != (image["width"], image["height"]):
            raise ValueError(
                f"{found.key}: {path} is {width} x {height} pixels, by {found.path} {image['width']} x "
                f"{image['height']}: its boxes are of another version of the images"
            )


def _check_boxes(dataset: Any, found: Annotations, counts: BoxCounts) -> None:
    loading: dict[str, Any] = next((step for step in dataset.pipeline if step.type.endswith("LoadAnnotations")), {})
    source = f"{found.key}: {found.path}"
    if counts.malformed:
        raise ValueError(
            f"{source}: annotations {first_names(counts.malformed)} lack bbox (4 numbers), area or category_id"
        )
    if loading.get("with_mask"):
        if counts.no_mask:
            raise ValueError(f"{source}: annotations {first_names(counts.no_mask)} have no segmentation: remove them")
        if counts.other_size:
            raise ValueError(
                f"{source}: annotations {first_names(counts.other_size)} have masks of another size than the image"
            )
        if counts.rle and not loading.get("poly2mask", True):
            step = list(dataset.pipeline).index(loading)
            raise ValueError(
                f"{source}: {counts.rle} masks of single objects are run-length encoded, which mmdet skips with "
                f"poly2mask=False: give {found.key}.pipeline.{step}.poly2mask=True"
            )
    if not counts.used:
        raise ValueError(f"{source}: no box of the classes lies inside its image and has an area")


def _check_used(cfg: Any, dataset: Any, found: Annotations, counts: BoxCounts) -> str:
    """The line of a training set; raises ValueError where no image is left or one would be resized to nothing."""
    smallest = (dataset.get("filter_cfg") or {}).get("min_size", 0)
    used = [i for i in found.images if i["id"] in counts.images and min(i["width"], i["height"]) >= smallest]
    if not used:
        raise ValueError(f"{found.key}: all images with boxes are smaller than filter_cfg.min_size={smallest}")
    notes = []
    for step in dataset.pipeline:
        if step.type.endswith("RandomResize"):
            least, most = (max(step.scale) * ratio for ratio in step.ratio_range)
            vanishing = [image["file_name"] for image in used if _short_side(image, least) < 0.5]
            if vanishing:
                raise ValueError(
                    f"{found.key}: {first_names(vanishing)} would be resized to a height or width of 0: they are too "
                    f"narrow, remove them or give {found.key}.filter_cfg.min_size"
                )
            window = cfg.model.backbone.get("window_size", 0) * cfg.model.backbone.get("patch_size", 16)
            narrow = sum(_short_side(image, most) < window for image in used)
            if narrow:
                notes.append(f"{narrow} images never fill a window of {window} pixels and are padded")
    return ", ".join([_describe(found, counts, len(used)), *notes])


def _short_side(image: dict[str, Any], long_side: float) -> float:
    sides = (image["width"], image["height"])
    return min(sides) * long_side / max(sides)


def _describe(found: Annotations, counts: BoxCounts, used: int) -> str:
    return ", ".join([f"{used} of {len(found.images)} images, {counts.used} boxes", *_notes(counts)])


def _notes(counts: BoxCounts) -> list[str]:
    found = (
        (counts.crowd, "crowds (ignored)"),
        (counts.outside, "boxes outside their image or without area (skipped)"),
        (counts.clipped, "boxes extend beyond their image (clipped)"),
        (counts.other_classes, "boxes of other categories (skipped)"),
        (counts.no_image, "annotations of images that are not listed (skipped)"),
        (counts.no_polygon, "masks without a polygon of three points (skipped)"),
    )
    return [f"{number} {what}" for number, what in found if number]
