"""Checks the data of a segmentation config before any model is built.

A training checks names, and some masks of each split. To read all masks, run
`python -m downstream.segment.check_masks CONFIG data_root=FOLDER [KEY=value ...]`, with the arguments of
downstream/segment/train_segmentor.py. mmseg is imported only when needed, so that the command can report what is
missing.
"""

import argparse
import functools
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.parallel import report_errors
from downstream.dense.data_checks import (
    applies_orientation,
    check_datasets,
    check_ops,
    first_names,
    is_local,
    needs_mm,
)
from downstream.dense.mmengine.dataset_keys import class_names
from downstream.dense.mmengine.encoder_start import has_start
from downstream.segment.mask_counts import IGNORED, MaskCounts, count_masks
from downstream.segment.mask_values import MaskValues
from downstream.segment.segmentor_keys import as_pair, flatten_steps, heads, image_folder, mask_folder, propagate_keys

OPENED_MASKS = 64
CONFIGS = Path(__file__).parent / "configs"


def check(cfg: Any, splits: Sequence[str] = ("train", "val"), opened: int | None = OPENED_MASKS) -> list[str]:
    """Checks each data set and returns a line about each.

    Args:
        cfg: an mmengine Config.
        splits: any of train, val and test.
        opened: number of masks to read per data set, evenly spaced; None: all.

    Raises:
        ValueError: something is wrong; one line for each data set, with the file and the key to change.
    """
    if "train" in splits and cfg.model.backbone.get("frozen") and not (has_start(cfg) or cfg.get("load_from")):
        raise ValueError(
            "model.backbone.frozen=True without an encoder would freeze random weights: give start.checkpoint=FILE"
        )
    return check_datasets(cfg, splits, functools.partial(_check_dataset, cfg, opened))


def _check_dataset(cfg: Any, opened: int | None, key: str, dataset: Any, split: str) -> str:
    from mmseg.datasets import BaseSegDataset
    from mmseg.registry import DATASETS

    from downstream.segment.mask_pairs import find_pairs

    kind = DATASETS.get(dataset.type)
    if kind is None or not issubclass(kind, BaseSegDataset):
        return f"type {dataset.type} is not checked"
    classes = class_names(dataset, kind)
    if not classes:
        raise ValueError(f'{key}: name the classes, in the order of their labels: classes=\'["soil", "wheat"]\'')
    check_heads(cfg, key, classes)
    _check_loading(cfg, key, dataset, split)
    if not is_local(image_folder(dataset)):
        return f"{image_folder(dataset)} is not on this machine and is not checked"
    names, notes = find_pairs(key, dataset, kind)
    pairs = [(os.path.join(image_folder(dataset), a), os.path.join(mask_folder(dataset), b)) for a, b in names]
    values = MaskValues.of(key, dataset, kind, classes)
    count = functools.partial(
        count_masks, key, labels=[*values.names], ignored=values.ignored, oriented=applies_orientation(dataset.pipeline)
    )
    read = pairs[:: math.ceil(len(pairs) / opened) if opened else 1]
    counts = count(read)
    if split == "train" and len(values.present(counts)) == 1 and len(read) < len(pairs):
        read = pairs  # masks with another class may be rare
        counts = count(read)
    _check_values(key, counts, values)
    if split == "train":
        if len(values.present(counts)) == 1:
            raise ValueError(f"{key}: {values.explain_one_class(counts)}")
        notes += _check_crops(key, dataset, counts)
    notes += values.notes(counts)
    return ", ".join([f"{len(pairs)} images, {len(read)} masks read", *notes])


def check_heads(cfg: Any, key: str, classes: tuple[str, ...]) -> None:
    """Raises ValueError if a head's number of classes is wrong, or its ignored label is not the one mmseg writes."""
    for name, head in heads(cfg):
        if head.get("ignore_index", IGNORED) != IGNORED:
            raise ValueError(
                f"{name}.ignore_index={head.ignore_index}: mmseg gives padded pixels the label {IGNORED}: leave it "
                f"out, and use {IGNORED} in the masks for pixels without a class"
            )
        if head.num_classes != len(classes):
            raise ValueError(
                f"{name}.num_classes={head.num_classes}, but {key} has {len(classes)} classes "
                f"({first_names(list(classes))}): name them in classes, which sets the number for all heads"
            )


def _check_loading(cfg: Any, key: str, dataset: Any, split: str) -> None:
    batch = cfg[f"{split}_dataloader"].get("batch_size", 1)
    if split != "train" and batch != 1:
        raise ValueError(f"{split}_dataloader.batch_size={batch}: evaluated images differ in size: give 1")
    for step in flatten_steps(dataset.pipeline):
        own = step.get("reduce_zero_label") if step.type.endswith("LoadAnnotations") else None
        if own is not None and own != dataset.get("reduce_zero_label", own):
            raise ValueError(
                f"{key}.pipeline: LoadAnnotations has reduce_zero_label={own}, its data set "
                f"{dataset.reduce_zero_label}: delete it from the pipeline, which then uses the data set's"
            )


def _check_values(key: str, counts: MaskCounts, values: MaskValues) -> None:
    if counts.broken:
        more = len(counts.broken) - 1
        raise ValueError(counts.broken[0] + (f"; {more} more cannot be used" if more else ""))
    if counts.outside:
        found = sorted({value for outside in counts.outside.values() for value in outside})
        raise ValueError(
            f"{key}: labels {first_names(list(map(str, found)))} in masks {first_names(list(counts.outside))}: "
            f"{values.explain_outside(found)}"
        )
    if len(counts.unlabeled) == len(counts.sizes):
        raise ValueError(f"{key}: no pixel of the masks read has a class: {values.explain_unlabeled(counts)}")


def _check_crops(key: str, dataset: Any, counts: MaskCounts) -> list[str]:
    """Notes about sizes; raises ValueError if an image would be resized to a side of 0, or no image fills a crop."""
    notes = []
    if counts.unlabeled:
        notes.append(f"{len(counts.unlabeled)} masks without a labeled pixel")
    sizes: list[tuple[float, float]] = list(counts.sizes)
    for step in flatten_steps(dataset.pipeline):
        if step.type.endswith("Resize") and "scale" in step:
            least, most = step.get("ratio_range", (1.0, 1.0))
            if any(min(_resized(size, step.scale, least)) < 0.5 for size in sizes):
                raise ValueError(
                    f"{key}: an image would be resized to a height or width of 0: it is too narrow, remove it"
                )
            sizes = [_resized(size, step.scale, most) for size in sizes]
        elif step.type.endswith("RandomCrop"):
            height, width = as_pair("size", step.crop_size)
            narrow = sum(size[0] < height or size[1] < width for size in sizes)
            if narrow == len(sizes):
                raise ValueError(
                    f"{key}: no image fills a crop of {height} x {width} pixels (height x width); they are "
                    f"at most {max(size[0] for size in sizes):.0f} x {max(size[1] for size in sizes):.0f}: "
                    f"give a smaller size, or a larger scale"
                )
            if narrow:
                notes.append(f"{narrow} images never fill a crop of {height} x {width} pixels and are padded")
    return notes


def _resized(size: tuple[float, float], scale: Sequence[int], ratio: float) -> tuple[float, float]:
    """The size after mmcv's keep_ratio resize: the largest that fits into both sides, in portrait or landscape."""
    factor = min(max(scale) * ratio / max(size), min(scale) * ratio / min(size))
    return size[0] * factor, size[1] * factor


def main(arguments: list[str] | None = None) -> int:
    """Returns exit code 0, or 1 with one clear error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="KEY=value", nargs="*")
    return report_errors(functools.partial(_run, parser.parse_args(arguments)))


def _run(options: argparse.Namespace) -> int:
    check_ops()
    with needs_mm():
        from mmengine.utils import import_modules_from_strings

        from downstream.dense.mmengine.config_file import load_job
    cfg = load_job(options.config, options.overrides, CONFIGS, propagate_keys).cfg
    import_modules_from_strings(**cfg.get("custom_imports") or {"imports": []})
    splits = [split for split in ("train", "val") if cfg.get(f"{split}_dataloader")]
    print(*check(cfg, splits, opened=None), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
