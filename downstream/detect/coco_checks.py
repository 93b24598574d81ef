"""Checks a detection config's data from its annotation files, in seconds, before any model is built.

Anything that would make mmdet fail in the middle of an epoch is an error here; what it would skip silently is counted.
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

from downstream.dense.data_checks import check_datasets, check_exists, first_names, is_local
from downstream.dense.mmengine.dataset_keys import class_names
from downstream.detect.coco_boxes import BoxCounts, count_boxes, is_finite
from downstream.detect.coco_images import check_images
from downstream.detect.detector_keys import annotation_file, evaluators, heads, image_folder

REQUIRED = {"images": ("id", "file_name", "height", "width"), "categories": ("id", "name"), "annotations": ("id",)}


@dataclass(frozen=True)
class Annotations:
    """The lists of a COCO-format file, its path, and the key of the data set that names it."""

    key: str
    path: str
    images: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    annotations: list[dict[str, Any]]


def check(cfg: Any, splits: Sequence[str] = ("train", "val")) -> list[str]:
    """Checks each data set and returns a line about each.

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
        return f"type {dataset.type} is not checked"
    path, folder = annotation_file(dataset), image_folder(dataset)
    if not is_local(path):
        return f"{path} is not on this machine and is not checked"
    found = read_annotations(key, path)
    classes = class_names(dataset, kind)
    check_classes(found, classes)
    check_heads(cfg, key, classes)
    if split != "train":
        ids_note = _check_evaluators(cfg, split, found)
        if dataset.get("indices") is not None:
            raise ValueError(
                f"{key}.indices={dataset.indices}: COCO's metrics count all images of {path}, also those without "
                f"predictions: leave it out, or give {key}.ann_file with these images only"
            )
    check_images(key, dataset, folder, path, found.images)
    counts = count_boxes(found.images, found.annotations, _category_ids(found, classes))
    _check_boxes(dataset, found, counts)
    if split == "train":
        notes = _check_used(cfg, dataset, found, counts)
    else:
        notes = [_describe(found, counts, len(found.images)), *ids_note]
    ids = {category["name"]: category["id"] for category in found.categories}
    if absent := [name for name in classes if ids[name] not in counts.categories]:
        notes.append(f"{len(absent)} classes without boxes: {first_names(absent)}")
    return ", ".join(notes)


def read_annotations(key: str, path: str) -> Annotations:
    """Reads an annotation file; raises ValueError if it is missing, empty, inconsistent or not in COCO's format."""
    check_exists(f"{key}.ann_file", path, "file")
    try:
        with open(path) as file:
            content = json.load(file)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{key}.ann_file: {path} is not JSON, or is truncated: {error}") from None
    for name, fields in REQUIRED.items():
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"{key}.ann_file: {path} has no {name}: is it an instances file in COCO's format?")
        incomplete = next((e for e in entries if not isinstance(e, dict) or any(f not in e for f in fields)), None)
        if incomplete is not None:
            raise ValueError(
                f"{key}.ann_file: {path}: an entry of {name} lacks one of {', '.join(fields)}: {str(incomplete)[:100]}"
            )
        strange = next((e for e in entries if not _has_values(e)), None)
        if strange is not None:
            raise ValueError(
                f"{key}.ann_file: {path}: an entry of {name} has an id that is neither a number nor text, a name that "
                f"is not text, or a height or width that is not a positive number: {str(strange)[:100]}"
            )
        repeated = [str(number) for number, times in Counter(e["id"] for e in entries).items() if times > 1]
        if repeated:
            raise ValueError(f"{key}.ann_file: {path}: {name} share the id {first_names(repeated)}: renumber them")
    return Annotations(key, path, content["images"], content["categories"], content["annotations"])


def _has_values(entry: dict[str, Any]) -> bool:
    """Whether the id, name and size (if present) of an image, a category or an annotation are usable."""
    sides = [entry[key] for key in ("height", "width") if "file_name" in entry]
    return (
        isinstance(entry["id"], (int, float, str))
        and all(isinstance(entry[key], str) for key in ("file_name", "name") if key in entry)
        and is_finite(sides)
        and all(side > 0 for side in sides)
    )


def check_classes(found: Annotations, classes: tuple[str, ...]) -> None:
    """Compares the classes with the file's categories, whose order determines mmdet's class numbers.

    Raises:
        ValueError: a number would mean different classes in the file and in the config.
    """
    names = [category["name"] for category in found.categories]
    present = [name for name in names if name in classes]
    if tuple(present) == classes:
        return
    fix = f"give classes='{json.dumps(names)}'" if len(names) <= 20 else "list its categories in classes, in its order"
    absent = [name for name in classes if name not in names]
    if absent:
        problem = f"has {len(names)} categories ({first_names(names)}), not the classes {first_names(absent)}"
    elif len(set(names)) < len(names):
        problem = "gives two categories the same name"
        fix = "rename one"
    else:
        problem = f"has the order {first_names(present)}, but classes has {first_names(list(classes))}"
    raise ValueError(f"{found.key}: {found.path} {problem}: {fix}")


def check_heads(cfg: Any, key: str, classes: tuple[str, ...]) -> None:
    """Raises ValueError if a head's number of classes differs from the data set's."""
    for name, head in heads(cfg):
        if head.num_classes != len(classes):
            raise ValueError(
                f"{name}.num_classes={head.num_classes}, but {key} has {len(classes)} classes "
                f"({first_names(list(classes))}): name them in classes, which sets the number for all heads"
            )


def _category_ids(found: Annotations, classes: tuple[str, ...]) -> set[int]:
    return {category["id"] for category in found.categories if category["name"] in classes}


def _check_evaluators(cfg: Any, split: str, found: Annotations) -> list[str]:
    """A note if the annotations' ids are replaced; raises ValueError if they would lead to wrong measurements."""
    strange = [a["id"] for a in found.annotations if not isinstance(a["id"], int) or a["id"] < 1]
    incomplete = [a["id"] for a in found.annotations if "iscrowd" not in a]
    for evaluator in evaluators(cfg, split):
        file = evaluator.get("ann_file")
        if file is not None and os.path.abspath(file) != os.path.abspath(found.path):
            raise ValueError(f"{split}_evaluator.ann_file={file} is not the file of {split}_dataloader, {found.path}")
        if (strange or incomplete) and evaluator.get("type") == "CocoMetric":  # AnyIdsCocoMetric takes any
            raise ValueError(
                f"{found.key}: {found.path}: annotation {(strange + incomplete)[0]!r} has no iscrowd, or an id that is "
                f"not an integer >= 1, which pycocotools would evaluate incorrectly: give {split}_evaluator.type="
                f"AnyIdsCocoMetric, from downstream.detect.coco_metric"
            )
    return [f"annotations are renumbered from 1 to measure AP (one has the id {strange[0]!r})"] if strange else []


def _check_boxes(dataset: Any, found: Annotations, counts: BoxCounts) -> None:
    source = f"{found.key}: {found.path}"
    if counts.malformed:
        raise ValueError(
            f"{source}: annotations {first_names(counts.malformed)} lack bbox (4 numbers), area or category_id"
        )
    loading: dict[str, Any] = next((step for step in dataset.pipeline if step.type.endswith("LoadAnnotations")), {})
    if loading.get("with_mask") and counts.used:
        _check_polygons(dataset, found, counts, loading)
    if not counts.used:
        raise ValueError(
            f"{source}: no box of the classes lies inside its image and has an area{_explain(found, counts)}"
        )


def _check_polygons(dataset: Any, found: Annotations, counts: BoxCounts, loading: dict[str, Any]) -> None:
    source = f"{found.key}: {found.path}"
    boxes_alone = "give with_masks=false for a detector without masks"
    if counts.no_mask:
        how_many = f"{len(counts.no_mask)} of {counts.used + counts.crowd} annotations"
        raise ValueError(
            f"{source}: {how_many} have no segmentation ({first_names(counts.no_mask)}): {boxes_alone}, or remove them"
        )
    if counts.malformed_mask:
        raise ValueError(
            f"{source}: annotations {first_names(counts.malformed_mask)} have a segmentation that is neither a list of "
            f"polygons, [[x, y, x, y, ...], ...], nor a run-length encoding: {boxes_alone}, or fix them"
        )
    if counts.other_size:
        raise ValueError(
            f"{source}: annotations {first_names(counts.other_size)} have masks of a different size than the image"
        )
    if counts.no_polygon == counts.used:
        raise ValueError(
            f"{source}: no mask has a polygon of at least three points, so all would be skipped: {boxes_alone}"
        )
    if counts.rle and not loading.get("poly2mask", True):
        step = list(dataset.pipeline).index(loading)
        raise ValueError(
            f"{source}: {counts.rle} masks of single objects are run-length encoded, which mmdet skips with "
            f"poly2mask=False: give {found.key}.pipeline.{step}.poly2mask=True"
        )


def _explain(found: Annotations, counts: BoxCounts) -> str:
    """The reason why no annotation is used, if it can be determined."""
    first = found.annotations[0]
    if counts.no_image == len(found.annotations):
        return f": no image has the id image_id={first.get('image_id')!r}; ids look like {found.images[0]['id']!r}"
    if counts.other_classes and not counts.annotated:
        ids = first_names([repr(category["id"]) for category in found.categories])
        return f": their category_id looks like {first['category_id']!r}, but the ids of categories are {ids}"
    if counts.fractions:
        return ": they are fractions of the image, but COCO's boxes are in pixels, [x, y, width, height]"
    return f": {', '.join(notes)}" if (notes := _notes(counts)) else ""


def _check_used(cfg: Any, dataset: Any, found: Annotations, counts: BoxCounts) -> list[str]:
    """The parts of the line about a training set.

    Raises:
        ValueError: no image is left, or one would be resized to a side of 0.
    """
    filters = dataset.get("filter_cfg") or {}
    smallest, without_boxes = filters.get("min_size", 0), not filters.get("filter_empty_gt", False)
    kept = [i for i in found.images if without_boxes or i["id"] in counts.annotated]
    used = [i for i in kept if min(i["width"], i["height"]) >= smallest]
    if not used:
        raise ValueError(f"{found.key}: all images with boxes are smaller than filter_cfg.min_size={smallest}")
    notes = []
    if left_out := len(found.images) - len(kept):
        fix = f"{found.key}.filter_cfg.filter_empty_gt=false keeps them"
        notes.append(f"{left_out} images without boxes are left out ({fix})")
    if len(used) < len(kept):
        notes.append(f"{len(kept) - len(used)} images are smaller than filter_cfg.min_size={smallest} (left out)")
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
    if dataset.get("indices") is not None:
        notes.append(f"limited by {found.key}.indices={dataset.indices}")
    return [_describe(found, counts, len(used)), *notes]


def _short_side(image: dict[str, Any], long_side: float) -> float:
    sides = (image["width"], image["height"])
    return min(sides) * long_side / max(sides)


def _describe(found: Annotations, counts: BoxCounts, used: int) -> str:
    return ", ".join([f"{used} of {len(found.images)} images, {counts.used} boxes", *_notes(counts)])


def _notes(counts: BoxCounts) -> list[str]:
    corners = (
        ": are they [x1, y1, x2, y2]? COCO's are [x, y, width, height]" if 2 * counts.clipped > counts.used else ""
    )
    found = (
        (counts.crowd, "crowds (ignored)"),
        (counts.outside, "boxes outside their image or without area (skipped)"),
        (counts.clipped, f"boxes extend beyond their image (clipped){corners}"),
        (counts.ignored, "boxes are marked with ignore (skipped)"),
        (counts.other_classes, "boxes of other categories (skipped)"),
        (counts.no_image, "annotations of images that are not listed (skipped)"),
        (counts.no_polygon, "masks without a polygon of at least three points (skipped)"),
    )
    return [f"{number} {what}" for number, what in found if number]
