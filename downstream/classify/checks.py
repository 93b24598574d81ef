"""Checks of a classifier's data, batches and number of classes before DeepSpeed starts."""

import logging

import numpy as np

from data.image_folder import Samples
from data.index import Index
from data.labels import check_labels, check_same_classes
from data.order import check_divisible, steps_per_epoch
from downstream.classify.config import FinetuneConfig
from pretrain.trainer.launch import World

_log = logging.getLogger(__name__)
MAX_NAMED = 10


def with_classes_of_data(config: FinetuneConfig, index: Index, val: Samples) -> FinetuneConfig:
    """Fills in a missing `head.num_classes` from the data: from its class names, or else from its labels.

    Raises:
        ValueError: samples without a label, or fewer than two classes.
    """
    if config.head.num_classes is not None:
        return config
    for key, samples in {"data.shards": index, "val.shards": val}.items():
        _check_labels(key, samples)
    num_classes = len(index.classes) or 1 + max(int(labels_in(samples).max()) for samples in (index, val))
    if num_classes < 2:
        raise ValueError(
            f"data.shards: {index.root} has one class, but a classifier needs at least two: pack a folder that has a "
            f"subfolder for each class"
        )
    head = config.head.model_copy(update={"num_classes": num_classes})
    return config.model_copy(update={"head": head})


def check_train_and_val(index: Index, val: Samples, num_classes: int) -> None:
    """Checks that both sets label the same `num_classes` classes; warns about classes without training images.

    Raises:
        ValueError: only one set has lists of labels; a sample has no label, or one that is not a class; the number of
            classes differs; or the class names show that a label means different classes in training and validation.
    """
    where, val_where = f"data.shards ({index.root})", f"val.shards ({val.root})"
    check_same_classes(index.classes, where, val.classes, val_where, "pack both with the same classes (--classes)")
    for key, samples in {"data.shards": index, "val.shards": val}.items():
        _check_labels(key, samples, num_classes)
        if samples.classes and len(samples.classes) != num_classes:
            raise ValueError(
                f"{key}: {samples.root} has {len(samples.classes)} classes ({samples.classes[0]}, ...), "
                f"but head.num_classes={num_classes} (by default, those of data.shards)"
            )
    if (index.multi_labels is None) != (val.multi_labels is None):
        lists, single = (where, val_where) if index.multi_labels is not None else (val_where, where)
        raise ValueError(f"{lists} has lists of labels, {single} one label per image: use the same kind in both")
    missing = np.flatnonzero(np.bincount(labels_in(index), minlength=num_classes) == 0).tolist()
    if missing:
        names = [index.classes[label] if index.classes else f"label {label}" for label in missing[:MAX_NAMED]]
        more = f" and {len(missing) - MAX_NAMED} more" if missing[MAX_NAMED:] else ""
        _log.warning(
            "%d of %d classes have no image in data.shards and will never be predicted: %s%s",
            len(missing),
            num_classes,
            ", ".join(names),
            more,
        )


def labels_in(samples: Samples) -> np.ndarray:
    """int32, all labels of all images, in arbitrary order."""
    return samples.label if samples.multi_labels is None else samples.multi_labels.classes


def _check_labels(key: str, samples: Samples, num_classes: int | None = None) -> None:
    try:
        check_labels(samples, num_classes, "head.num_classes")
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def check_batches(config: FinetuneConfig, world: World, num_images: int) -> None:
    """Raises ValueError if the images do not fill a batch, the ranks do not divide it, or an image has no partner.

    Mixup and cutmix mix pairs of images.
    """
    train = config.train
    check_divisible(train.global_batch_size, world.size, train.gradient_accumulation_steps)
    steps_per_epoch(num_images, train.global_batch_size)
    micro = train.global_batch_size // (world.size * train.gradient_accumulation_steps)
    if config.augment.mixes and micro % 2:
        raise ValueError(
            f"augment.mixup and augment.cutmix mix pairs of images, but each of {world.size} ranks has batches of "
            f"{micro} (train.global_batch_size={train.global_batch_size}, "
            f"train.gradient_accumulation_steps={train.gradient_accumulation_steps}): make this even"
        )
