"""Finds the mask of each image in a data set, as mmseg does."""

import itertools
import os
from pathlib import Path
from typing import Any

from downstream.dense.data_checks import check_exists, find_missing, first_names
from downstream.segment.mask_values import setting
from downstream.segment.own_dataset import list_images, strip_suffix
from downstream.segment.segmentor_keys import image_folder, mask_folder


def find_pairs(key: str, dataset: Any, kind: Any) -> tuple[list[tuple[str, str]], list[str]]:
    """Relative paths of images and their masks, as mmseg pairs them, and notes about unused files.

    Args:
        key: of the data set, for messages.
        dataset: its configuration.
        kind: its type, a class of mmseg.

    Raises:
        ValueError: a folder does not exist or has no images, images have no mask, or two images share one.
    """
    images, masks = image_folder(dataset), mask_folder(dataset)
    check_exists(f"{key}.data_prefix.img_path", images, "folder")
    check_exists(f"{key}.data_prefix.seg_map_path", masks, "folder")
    suffix, mask_suffix = (setting(dataset, kind, name) for name in ("img_suffix", "seg_map_suffix"))
    names = list_images(images, suffix)
    stems = {strip_suffix(name, suffix): name for name in names}
    if len(stems) < len(names):
        first, second = next(
            (a, b) for a, b in itertools.pairwise(names) if strip_suffix(a, suffix) == strip_suffix(b, suffix)
        )
        raise ValueError(f"{key}: {first} and {second} in {images} would share a mask: give {key}.img_suffix")
    if dataset.get("ann_file"):
        path = os.path.join(dataset.get("data_root") or "", dataset.ann_file)
        check_exists(f"{key}.ann_file", path, "file")
        listed = [line.strip() for line in os.fsdecode(Path(path).read_bytes()).splitlines()]
        if absent := [stem + (suffix or "") for stem in listed if stem not in stems]:
            raise ValueError(f"{key}: {len(absent)} images listed in {path} are not in {images}: {first_names(absent)}")
        stems = {stem: stems[stem] for stem in listed}
    used = (suffix, mask_suffix) if images == masks else (suffix,)
    others = [name for name in list_images(images, None) if suffix and not name.endswith(used)]
    suffixes = ", ".join(sorted({os.path.splitext(name)[1] for name in others}))
    if not stems:
        present = f"only {suffixes}: set {key}.img_suffix" if others else "it has no other images"
        raise ValueError(f"{key}: no image *{suffix or ''} in {images}; {present}")
    _check_missing_masks(key, masks, mask_suffix, [*stems])
    paired = {stem + mask_suffix for stem in stems}
    unpaired = [name for name in list_images(masks, mask_suffix) if name not in paired]
    notes = [f"{len(others)} images with a suffix other than {suffix} ({suffixes}) are not used"] if others else []
    if unpaired and not dataset.get("ann_file"):  # with an ann_file, the others may belong to another split
        notes.append(f"{len(unpaired)} masks have no image (not used)")
    return [(stems[stem], stem + mask_suffix) for stem in sorted(stems)], notes


def _check_missing_masks(key: str, masks: str, suffix: str, stems: list[str]) -> None:
    """Raises ValueError if images have no mask, suggesting a suffix that would find the first missing one."""
    missing = find_missing(masks, [stem + suffix for stem in stems])
    if not missing:
        return
    stem = missing[0].removesuffix(suffix)
    named = sorted((name for name in list_images(masks, "") if name.startswith(stem)), key=len)
    hint = (
        f"there is {named[0]}: give {key}.seg_map_suffix={named[0].removeprefix(stem)}"
        if named
        else f"are {key}.data_prefix.seg_map_path and seg_map_suffix={suffix} right, and is everything unpacked?"
    )
    raise ValueError(
        f"{key}: {len(missing)} of the {len(stems)} images have no mask in {masks}: {first_names(missing)}; {hint}"
    )
