"""Checks of labels and of class names, for everything that reads labeled samples."""

from collections.abc import Sequence

import numpy as np

from data.image_folder import Samples
from data.multi_labels import MultiLabels
from data.scan import NO_LABEL


def check_labels(samples: Samples, num_classes: int | None = None, key: str = "") -> None:
    """Checks that every sample has a label, below `num_classes` if that is given.

    If samples have lists of labels, every number in them is checked, and a list may be empty.

    Args:
        samples: shards or a folder.
        num_classes: how many classes there are.
        key: the configuration key that sets this number, for the message.

    Raises:
        ValueError: a label is invalid or missing; quotes the invalid label, or says how many samples have no such label
            and names the first of them.
    """
    if samples.label_problem:
        raise ValueError(f"{samples.root}: {samples.label_problem}")
    if samples.multi_labels is not None:
        _check_lists(samples, samples.multi_labels, num_classes, key)
        return
    labels = samples.label
    bad = labels < 0
    if num_classes is not None:
        bad |= labels >= num_classes
    if not bad.any():
        return
    first = int(bad.argmax())
    problem = f"{int(bad.sum())} of {len(samples)} samples in {samples.root} have no label"
    if num_classes is None:
        raise ValueError(
            f"{problem}, for example '{samples.keys[first]}': use class folders without images beside them, or "
            "shards with .cls files"
        )
    raise ValueError(
        f"{problem} in 0..{num_classes - 1} ({key}={num_classes}): labels range from {labels.min()} to {labels.max()} "
        f"({NO_LABEL}: none), '{samples.keys[first]}' has {labels[first]}"
    )


def _check_lists(samples: Samples, lists: MultiLabels, num_classes: int | None, key: str) -> None:
    if not len(lists.classes):
        raise ValueError(f"all lists of labels in {samples.root} are empty: add `labels` to the .json of some samples")
    highest = int(lists.classes.max())
    if num_classes is not None and highest >= num_classes:
        first = int(np.searchsorted(lists.ends, int(lists.classes.argmax()), side="right"))
        raise ValueError(
            f"'{samples.keys[first]}' in {samples.root} has the label {highest}, which is not in 0..{num_classes - 1} "
            f"({key}={num_classes})"
        )


def check_same_classes(
    classes: Sequence[str], where: str, other_classes: Sequence[str], other_where: str, advice: str
) -> None:
    """Raises ValueError if a label means one class in one place and another one in the other.

    Sets without class names (nothing in `classes` or in `other_classes`) are taken to agree. If one set has more
    classes than the other, only the labels of both are compared.

    Args:
        classes, other_classes: names of the classes, in the order of their labels.
        where, other_where: what has these classes, for the message.
        advice: what to do about it, for the message.
    """
    for label, (name, other) in enumerate(zip(classes, other_classes, strict=False)):
        if name != other:
            raise ValueError(f"label {label} is '{name}' in {where} and '{other}' in {other_where}: {advice}")
