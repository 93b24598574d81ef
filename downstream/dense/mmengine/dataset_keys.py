"""The data sets of a configuration, and the top-level keys that are copied into each of them."""

import os
from collections.abc import Iterator
from typing import Any

SPLITS = ("train", "val", "test")

# All top-level keys that are copied; see `propagate_keys` of detection and of segmentation.
PROPAGATED = ("data_root", "classes", "size", "with_masks", "reduce_zero_label", "mask_values", "stride", "scale")


def propagate_data_keys(cfg: Any) -> None:
    """Copies `data_root` and `classes`, unless they are None, into every data set of an mmengine Config.

    Raises:
        ValueError: `classes` is not a list of different names.
    """
    classes = cfg.get("classes")
    if classes is not None:
        names = not isinstance(classes, str) and all(isinstance(name, str) for name in classes)
        if not names or not classes or len(set(classes)) < len(classes):
            raise ValueError(
                f"""classes={classes!r}: give distinct names in the order of the annotations: """
                f"""classes='["cat", "dog"]'"""
            )
    for split in SPLITS:
        for _, dataset in datasets(cfg, split):
            if cfg.get("data_root") is not None:
                dataset.data_root = cfg.data_root
            if classes is not None:
                dataset.metainfo = {"classes": tuple(classes)}


def datasets(cfg: Any, split: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, data set) of each data set of a split; wrappers are replaced by what they wrap."""
    loader = cfg.get(f"{split}_dataloader")
    if loader is not None:
        yield from _unwrap(f"{split}_dataloader.dataset", loader.dataset)


def _unwrap(key: str, dataset: Any) -> Iterator[tuple[str, Any]]:
    if "dataset" in dataset:
        yield from _unwrap(f"{key}.dataset", dataset.dataset)
    elif "datasets" in dataset:
        for number, inner in enumerate(dataset.datasets):
            yield from _unwrap(f"{key}.datasets.{number}", inner)
    else:
        yield key, dataset


def below_root(dataset: Any, path: str) -> str:
    """Resolves a path like mmengine's data sets: below their root, unless it is absolute."""
    return os.path.join(dataset.get("data_root") or "", path)


def class_names(dataset: Any, kind: Any) -> tuple[str, ...]:
    """The class names in the order of the heads' outputs: the data set's own, or those of its type.

    Args:
        dataset: its configuration.
        kind: its type, a class of mmdet or mmseg.
    """
    return tuple((dataset.get("metainfo") or {}).get("classes") or kind.METAINFO.get("classes") or ())
