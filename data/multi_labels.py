"""Several labels per sample, and how labels are read from a shard's members."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data.class_list import same_name
from data.names import readable

MAX_LABEL = 2**31 - 1
_QUOTED = 60  # characters of a label that a message quotes

Label = int | tuple[int, ...] | None  # a class, several, or no label


@dataclass(frozen=True, eq=False)
class MultiLabels:
    """The classes of N samples, T in all."""

    classes: np.ndarray  # int32 (T,)
    ends: np.ndarray  # int64 (N,), where in `classes` those of each sample end

    @classmethod
    def of(cls, labels: Sequence[tuple[int, ...]]) -> "MultiLabels":
        """Packs the classes of each sample."""
        ends = np.cumsum([len(classes) for classes in labels], dtype=np.int64)
        return cls(np.array([number for classes in labels for number in classes], np.int32), ends)

    @classmethod
    def join(cls, parts: Sequence["MultiLabels"]) -> "MultiLabels":
        """Joins the labels of several sets of samples, one after the other."""
        totals = np.cumsum([0, *(len(part.classes) for part in parts)])
        ends = [part.ends + total for part, total in zip(parts, totals, strict=False)]
        return cls(np.concatenate([part.classes for part in parts]), np.concatenate(ends))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, sample: int) -> tuple[int, ...]:
        """The classes of one sample."""
        start = int(self.ends[sample - 1]) if sample else 0
        return tuple(self.classes[start : int(self.ends[sample])].tolist())

    def part(self, start: int, stop: int) -> "MultiLabels":
        """The classes of consecutive samples."""
        before = int(self.ends[start - 1]) if start else 0
        ends = self.ends[start:stop] - before
        return MultiLabels(self.classes[before : before + (int(ends[-1]) if len(ends) else 0)], ends)

    def rows(self, samples: np.ndarray, num_classes: int) -> np.ndarray:
        """Returns float32 (B, num_classes), 1 at the classes of each of the samples, int64 (B,).

        Raises:
            ValueError: a class is not below `num_classes`.
        """
        rows = np.zeros((len(samples), num_classes), np.float32)
        for row, sample in zip(rows, samples.tolist(), strict=True):
            classes = list(self[sample])
            if classes and max(classes) >= num_classes:
                raise ValueError(f"sample {sample} has the label {max(classes)}, but there are {num_classes} classes")
            row[classes] = 1
        return rows


class Labeled(Protocol):
    """Samples that may have labels: shards or a folder."""

    @property
    def label(self) -> np.ndarray: ...

    @property
    def multi_labels(self) -> MultiLabels | None: ...


class LabelReader:
    """The labels of samples in the form that a loss needs."""

    def __init__(self, samples: Labeled, num_classes: int | None) -> None:
        """Reads the lists of labels, if the samples have them, only with `num_classes`."""
        self._samples = samples  # not its arrays, which would be copied to a spawned worker
        self._num_classes = num_classes

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Returns int64 (B,), NO_LABEL if there is none; for label lists float32 (B, num_classes), 1 or 0."""
        lists = self._samples.multi_labels
        if lists is None or self._num_classes is None:
            return self._samples.label[samples].astype(np.int64)
        return lists.rows(samples, self._num_classes)


class UnusableLabel(ValueError):  # noqa: N818 - no problem until somebody needs the label
    """An invalid label; says what it is and what to do."""


def read_cls(content: bytes, numbers: Mapping[str, int]) -> int | None:
    """Reads the class in a ``.cls`` member: a number, or a name that `numbers` knows; None if it is empty or -1.

    Raises:
        UnusableLabel: it is neither.
    """
    return _class(readable(content.decode("utf-8", "surrogateescape").strip()), numbers)


def read_json(content: bytes, numbers: Mapping[str, int]) -> Label:
    """Reads the class in `label`, or the classes in the list `labels`, of a ``.json`` member; None without these keys.

    Raises:
        UnusableLabel: such a key holds anything else.
    """
    if b'"label' not in content:  # most have only captions, and parsing takes longer than searching
        return None
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UnusableLabel(f"its .json cannot be read ({error}): write the shard again") from error
    if not isinstance(fields, dict):
        return None
    label, labels = fields.get("label"), fields.get("labels")
    if labels is None:
        return None if label is None else _class(label, numbers)
    if label is not None:
        raise UnusableLabel("its .json has both 'label' and 'labels': leave one of them out")
    if not isinstance(labels, list):
        raise UnusableLabel(f"'labels' in its .json is {_quote(labels)}, not a list: use 'label' for a single class")
    classes = []
    for item in labels:
        number = _class(item, numbers)
        if number is None:
            raise UnusableLabel(f"'labels' in its .json contains {_quote(item)}: leave it out")
        classes.append(number)
    return tuple(classes)


def _class(value: object, numbers: Mapping[str, int]) -> int | None:
    number = value
    if isinstance(value, str):
        if re.fullmatch("[+-]?[0-9]{1,12}", value):  # also where a class has this name: `data.pack` writes numbers
            number = int(value)
        elif (named := numbers.get(same_name(value))) is not None:
            return named
        elif value == "":
            return None
        else:
            known = "which is not in classes.txt" if numbers else "and there is no classes.txt"
            raise UnusableLabel(
                f"its label is {_quote(value)}, {known}: labels are numbers from 0 on, or names listed in label "
                f"order, one per line, in classes.txt next to the shards"
            )
    if isinstance(number, int) and not isinstance(number, bool) and -1 <= number <= MAX_LABEL:
        return None if number == -1 else number
    raise UnusableLabel(f"its label is {_quote(value)}: labels are numbers from 0 to {MAX_LABEL}, or names")


def _quote(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}..."
