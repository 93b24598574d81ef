"""What is wrong with a detection config's data, found in seconds on the annotation files, before any model is built.

What mmdet would only stumble over in the middle of an epoch, or skip without a word, is an error or a number here.
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

from downstream.dense.data_checks import check_datasets, check_exists, find_missing, first_names, image_size, is_local
from downstream.dense.mmengine.dataset_keys import class_names
from downstream.detect.coco_boxes import BoxCounts, count_boxes
from downstream.detect.detector_keys import annotation_file, image_folder

OPENED_IMAGES = 16
NEEDED = {"images": ("id", "file_name", "height", "width"), "categories": ("id", "name"), "annotations": ("id",)}


@dataclass(frozen=True)
class Annotations:
    """A file in COCO's format, its lists as they stand there, and the key of the config that names it."""

    key: str
    path: str
    images: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    annotations: list[dict[str, Any]]


def check(cfg: Any, splits: Sequence[str] = ("train", "val")) -> list[str]:
    """One line about each data set.

    Args:
        cfg: an mmengine Config.
        splits: of train, val and test.

    Raises:
        ValueError: something is wrong; a line for each thing, with the file and the key to change.
    """
    return check_datasets(cfg, splits, functools.partial(_check_dataset, cfg))


def _check_dataset(cfg: Any, key: str, dataset: Any, split: str) -> str:
    kind = DATASETS.get(dataset.type)
    if kind is None or not issubclass(kind, CocoDataset):
        return f"a {dataset.type} is not checked"
    path, folder = annotation_file(dataset), image_folder(dataset)
    if not is_local(path):
        return f"{path} is not on this machine and not checked"
    found = read_annotations(key, path)
    classes = class_names(dataset, kind)
    check_classes(found, classes)
    check_heads(cfg, key, classes)
    if split != "train":
        _check_evaluator(cfg, split, path)
    _check_images(found, folder)
    counts = count_boxes(found.images, found.annotations, _wanted(found, classes))
    _check_boxes(dataset, found, counts)
    return _check_used(cfg, dataset, found, counts) if split == "train" else _describe(found, counts, len(found.images))


def read_annotations(key: str, path: str) -> Annotations:
    """Raises ValueError where there is no such file, or it is not COCO's format, or it is empty or not consistent."""
    check_exists(f"{key}.ann_file", path, "file")
    try:
        with open(path) as file:
            content = json.load(file)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{key}.ann_file: {path} is not JSON, or cut off: {error}") from None
    for name, fields in NEEDED.items():
        rows = content.get(name) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{key}.ann_file: {path} has no {name}: is it a file of instances in COCO's format?")
        lacking = next((row for row in rows if not isinstance(row, dict) or any(f not in row for f in fields)), None)
        if lacking is not None:
            raise ValueError(
                f"{key}.ann_file: {path}: one of {name} lacks one of {', '.join(fields)}: {str(lacking)[:100]}"
            )
        twice = [str(number) for number, times in Counter(row["id"] for row in rows).items() if times > 1]
        if twice:
            raise ValueError(f"{key}.ann_file: {path}: {name} share the id {first_names(twice)}: number them anew")
    return Annotations(key, path, content["images"], content["categories"], content["annotations"])


def check_classes(found: Annotations, classes: tuple[str, ...]) -> None:
    """mmdet numbers classes in the order of the file, leaving out those that are not asked for or not there.

    Raises:
        ValueError: so that a number would mean another class in the file than in the config.
    """
    names = [row["name"] for row in found.categories]
    there = [name for name in names if name in classes]
    if tuple(there) == classes:
        return
    mend = f"give classes='{json.dumps(names)}'" if len(names) <= 20 else "name its categories in classes, in its order"
    absent = [name for name in classes if name not in names]
    if absent:
        say = f"has {len(names)} categories ({first_names(names)}), not the classes {first_names(absent)}"
    elif len(set(names)) < len(names):
        say = "gives two categories the same name"
        mend = "rename one"
    else:
        say = f"has the order {first_names(there)}, the classes {first_names(list(classes))}"
    raise ValueError(f"{found.key}: {found.path} {say}: {mend}")


def check_heads(cfg: Any, key: str, classes: tuple[str, ...]) -> None:
    """Raises ValueError where a head predicts another number of classes than the data set has."""
    for name in ("bbox_head", "mask_head"):
        head = cfg.model.roi_head.get(name)
        if head is not None and head.num_classes != len(classes):
            raise ValueError(
                f"model.roi_head.{name}.num_classes={head.num_classes}, but {key} has {len(classes)} classes "
                f"({first_names(list(classes))}): name them in classes, from which both heads take their number"
            )


def _wanted(found: Annotations, classes: tuple[str, ...]) -> set[int]:
    return {row["id"] for row in found.categories if row["name"] in classes}


def _check_evaluator(cfg: Any, split: str, path: str) -> None:
    evaluator = cfg.get(f"{split}_evaluator") or {}
    file = evaluator.get("ann_file")
    if file is not None and os.path.abspath(file) != os.path.abspath(path):
        raise ValueError(f"{split}_evaluator.ann_file={file} is not the file of {split}_dataloader, {path}")


def _check_images(found: Annotations, folder: str) -> None:
    check_exists(f"{found.key}.data_prefix.img", folder, "folder")
    missing = find_missing(folder, (row["file_name"] for row in found.images))
    if missing:
        raise ValueError(
            f"{found.key}: {len(missing)} of the {len(found.images)} images of {found.path} are not in {folder}: "
            f"{first_names(missing)}; is data_prefix.img right, and everything unpacked?"
        )
    for row in found.images[:: max(len(found.images) // OPENED_IMAGES, 1)]:
        path = os.path.join(folder, row["file_name"])
        height, width = image_size(found.key, path)
        if (width, height) != (row["width"], row["height"]):
            raise ValueError(
                f"{found.key}: {path} is {width} x {height} pixels, by {found.path} {row['width']} x {row['height']}: "
                f"its boxes are of another version of the images"
            )


def _check_boxes(dataset: Any, found: Annotations, counts: BoxCounts) -> None:
    loading: dict[str, Any] = next((step for step in dataset.pipeline if step.type.endswith("LoadAnnotations")), {})
    place = f"{found.key}: {found.path}"
    if counts.malformed:
        raise ValueError(
            f"{place}: annotations {first_names(counts.malformed)} lack bbox (4 numbers), area or category_id"
        )
    if loading.get("with_mask"):
        if counts.no_mask:
            raise ValueError(f"{place}: annotations {first_names(counts.no_mask)} have no segmentation: remove them")
        if counts.other_size:
            raise ValueError(
                f"{place}: annotations {first_names(counts.other_size)} have masks of another size than the image"
            )
        if counts.rle and not loading.get("poly2mask", True):
            step = list(dataset.pipeline).index(loading)
            raise ValueError(
                f"{place}: {counts.rle} masks of single objects are run lengths, which mmdet leaves out with "
                f"poly2mask=False: give {found.key}.pipeline.{step}.poly2mask=True"
            )
    if not counts.used:
        raise ValueError(f"{place}: not one box of the classes lies inside of its image and has an area")


def _check_used(cfg: Any, dataset: Any, found: Annotations, counts: BoxCounts) -> str:
    """The line of a training set; raises ValueError where nothing is left of it or an image would shrink to nothing."""
    smallest = (dataset.get("filter_cfg") or {}).get("min_size", 0)
    used = [row for row in found.images if row["id"] in counts.images and min(row["width"], row["height"]) >= smallest]
    if not used:
        raise ValueError(f"{found.key}: all images with boxes are smaller than filter_cfg.min_size={smallest}")
    odd = []
    for step in dataset.pipeline:
        if step.type.endswith("RandomResize"):
            least, most = (max(step.scale) * ratio for ratio in step.ratio_range)
            vanish = [row["file_name"] for row in used if _short_side(row, least) < 0.5]
            if vanish:
                raise ValueError(
                    f"{found.key}: {first_names(vanish)} would shrink to a height or width of 0: they are too narrow, "
                    f"remove them or give {found.key}.filter_cfg.min_size"
                )
            window = cfg.model.backbone.get("window", 0) * cfg.model.backbone.get("patch", 16)
            narrow = sum(_short_side(row, most) < window for row in used)
            if narrow:
                odd.append(f"{narrow} images never fill a window of {window} pixels and are padded")
    return ", ".join([_describe(found, counts, len(used)), *odd])


def _short_side(row: dict[str, Any], long_side: float) -> float:
    return min(row["width"], row["height"]) * long_side / max(row["width"], row["height"])


def _describe(found: Annotations, counts: BoxCounts, used: int) -> str:
    return ", ".join([f"{used} of {len(found.images)} images, {counts.used} boxes", *_odd(counts)])


def _odd(counts: BoxCounts) -> list[str]:
    found = (
        (counts.crowd, "crowds (ignored)"),
        (counts.outside, "boxes outside of their image or without area (skipped)"),
        (counts.reaching, "boxes reach out of their image (clipped)"),
        (counts.other_classes, "boxes of other categories (skipped)"),
        (counts.no_image, "annotations of images that are not listed (skipped)"),
        (counts.no_polygon, "masks without a polygon of three points (skipped)"),
    )
    return [f"{number} {what}" for number, what in found if number]
