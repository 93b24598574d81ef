"""Copies top-level keys of a segmentation config to wherever mmseg reads them.

The keys are `data_root` and `classes`, as in detection, `reduce_zero_label` and `mask_values`, and the sizes `size`,
`stride` and `scale`.
"""

from collections.abc import Iterator
from typing import Any

from data.transforms import height_width
from downstream.dense.mmengine.dataset_keys import SPLITS, below_root, datasets, propagate_data_keys


def propagate_keys(cfg: Any) -> None:
    """Fills in data sets, pipelines and the model from an mmengine Config's top-level keys, in place.

    A key that is None changes nothing. Beyond `propagate_data_keys`:
    `classes`, names in the order of their labels: their number becomes every head's `num_classes`; an ADE20KDataset
    with other classes becomes an OwnSegDataset.
    `reduce_zero_label`: whether label 0 is ignored and the first class is 1, in every data set.
    `mask_values`: the value of each class in the masks, instead of `reduce_zero_label`; [0, 255] for two classes.
    `size`, pixels or (height, width): the size of training crops, of padded batches, of the images that the backbone
    is built for, and of the windows of an evaluation. `stride`: the distance between these windows.
    `scale`, (long, short) side: the size that images are resized to, in training times a random ratio.

    Raises:
        ValueError: `classes` is not a list of at least two different names, `mask_values` is not a list of as many
            different values, or a size is invalid.
    """
    propagate_data_keys(cfg)
    classes = cfg.get("classes")
    if classes is not None and len(classes) < 2:
        raise ValueError(f"classes={classes!r}: give at least two; one of them may be the background")
    if cfg.get("mask_values") is not None:
        _check_mask_values(cfg)
        cfg.reduce_zero_label = False
    for split in SPLITS:
        for _, dataset in datasets(cfg, split):
            if classes is not None and dataset.type == "ADE20KDataset":
                dataset.type = "OwnSegDataset"
            if cfg.get("mask_values") is not None:
                dataset.update(type="OwnSegDataset", mask_values=cfg.mask_values)
            if cfg.get("reduce_zero_label") is not None:
                dataset.reduce_zero_label = cfg.reduce_zero_label
            _propagate_sizes(cfg, dataset.pipeline)
    _propagate_sizes(cfg, cfg.get("tta_pipeline") or [])
    if classes is not None:
        for _, head in heads(cfg):
            head.num_classes = len(classes)
    if cfg.get("size") is not None:
        size = as_pair("size", cfg.size, cfg.model.backbone.get("patch_size", 1))
        cfg.model.data_preprocessor.size = cfg.model.backbone.img_size = size
        if cfg.model.test_cfg.mode == "slide":
            cfg.model.test_cfg.crop_size = size
    if cfg.get("stride") is not None and cfg.model.test_cfg.mode == "slide":
        cfg.model.test_cfg.stride = as_pair("stride", cfg.stride)
        windows = cfg.model.test_cfg
        if any(step > side for step, side in zip(windows.stride, windows.crop_size, strict=True)):
            raise ValueError(
                f"stride={cfg.stride} leaves gaps between windows of size={tuple(windows.crop_size)}: set stride= to "
                f"at most that, usually two thirds of it"
            )


def _check_mask_values(cfg: Any) -> None:
    values = cfg.mask_values
    numbers = isinstance(values, list | tuple) and all(isinstance(n, int) and 0 <= n <= 255 for n in values)
    if not numbers or len({*values}) != len(cfg.get("classes") or ()):
        raise ValueError(
            f"""mask_values={values!r}: give a distinct value from 0 to 255 for each of the classes, in order: """
            f"""classes='["background", "lesion"]' mask_values=[0,255]"""
        )


def _propagate_sizes(cfg: Any, steps: Any) -> None:
    for step in flatten_steps(steps):
        if "crop_size" in step and cfg.get("size") is not None:
            step.crop_size = as_pair("size", cfg.size)
        if "scale" in step and cfg.get("scale") is not None:
            step.scale = as_pair("scale", cfg.scale)


def flatten_steps(steps: Any) -> Iterator[Any]:
    """The steps of a pipeline; TestTimeAug is replaced by the steps that it combines."""
    for step in steps:
        if isinstance(step, dict):
            yield from flatten_steps(step["transforms"]) if "transforms" in step else [step]
        else:
            yield from flatten_steps(step)


def as_pair(key: str, value: Any, multiple: int = 1) -> tuple[int, int]:
    """Makes a pair of one number or two; raises ValueError, naming `key`, unless both are valid multiples."""
    try:
        pair = height_width(value)
    except (TypeError, ValueError):
        pair = (0, 0)
    if not all(isinstance(side, int) and side > 0 and side % multiple == 0 for side in pair):
        what = "numbers of pixels" if multiple == 1 else f"multiples of {multiple} (model.backbone.patch_size)"
        raise ValueError(f"{key}={value!r}: must be one or two {what}")
    return pair


def heads(cfg: Any) -> Iterator[tuple[str, Any]]:
    """The heads of an mmseg model with their dotted keys."""
    yield "model.decode_head", cfg.model.decode_head
    auxiliary = cfg.model.get("auxiliary_head") or []
    if isinstance(auxiliary, dict):
        yield "model.auxiliary_head", auxiliary
    else:
        for number, head in enumerate(auxiliary):
            yield f"model.auxiliary_head.{number}", head


def image_folder(dataset: Any) -> str:
    return below_root(dataset, dataset.data_prefix.get("img_path") or "")


def mask_folder(dataset: Any) -> str:
    return below_root(dataset, dataset.data_prefix.get("seg_map_path") or "")
