"""The values that a data set's masks may have, and what other values probably mean."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from downstream.dense.data_checks import first_names
from downstream.segment.mask_counts import IGNORED, MaskCounts


@dataclass(frozen=True)
class MaskValues:
    """The meaning of the values in the masks of a data set.

    Attributes:
        names: value -> name of each class in the files; if the data set uses a subset of its type's classes, all of
            the type's.
        used: the names of the classes that are predicted.
        ignored: the values of pixels without a class.
        reduces: `reduce_zero_label`.
        listed: whether `mask_values` lists the values.
    """

    names: dict[int, str]
    used: Sequence[str]
    ignored: set[int]
    reduces: bool
    listed: bool

    @classmethod
    def of(cls, key: str, dataset: Any, kind: Any, classes: Sequence[str]) -> "MaskValues":
        """Reads them from a data set's configuration; raises ValueError if mmseg's 8 bits are too few.

        Args:
            key: of the data set, for messages.
            dataset: its configuration.
            kind: its type, a class of mmseg.
            classes: the names of its classes.
        """
        known = tuple(kind.METAINFO.get("classes") or classes)
        reduces, listed = bool(setting(dataset, kind, "reduce_zero_label")), dataset.get("mask_values")
        if len(known) > IGNORED - reduces:
            raise ValueError(
                f"{key}: {len(known)} classes: mmseg reads masks as 8 bits, with {IGNORED} for no class, so there can "
                f"be at most {IGNORED - reduces}"
            )
        values = listed or range(int(reduces), len(known) + reduces)
        ignored = {IGNORED, 0} if reduces else {IGNORED} - set(values)
        return cls(dict(zip(values, known, strict=True)), classes, ignored, reduces, bool(listed))

    def present(self, counts: MaskCounts) -> list[str]:
        """The names of the predicted classes that have a pixel."""
        return [name for value, name in self.names.items() if counts.pixels[value] and name in self.used]

    def notes(self, counts: MaskCounts) -> list[str]:
        """Notes about usable masks."""
        present = set(self.present(counts))
        absent = [name for name in self.names.values() if name in self.used and name not in present]
        if not absent:
            return []
        note = f"{len(absent)} classes without a pixel in them: {first_names(absent)}"
        if self.reduces and not counts.pixels[len(self.names)] and counts.pixels[0]:
            note += "; are labels numbered from 0? then give reduce_zero_label=false"
        return [note]

    def explain_one_class(self, counts: MaskCounts) -> str:
        """The reason why masks whose labeled pixels all belong to one class are useless."""
        (name,) = self.present(counts)
        problem = f"all labeled pixels of the masks are {name}, so nothing would be learned"
        share = counts.pixels[IGNORED] / max(counts.pixels.total(), 1)
        if IGNORED in self.ignored and share:
            problem += f"; {share:.0%} of the pixels are {IGNORED}, which means no class"
            if len(self.used) == 2:
                problem += f": if it means {self.used[1]}, give mask_values=[0,255]"
        return problem

    def explain_outside(self, found: Sequence[int]) -> str:
        """The values that masks may have, given the invalid values found."""
        none = " or ".join(map(str, sorted(self.ignored)))
        if self.listed:
            return f"mask_values allows {', '.join(map(str, self.names))}" + (f", and {none} for no class" * bool(none))
        first, last = min(self.names), max(self.names)
        hint = "name all classes in classes"
        if not self.reduces and list(found) == [last + 1]:
            hint = "are they numbered from 1? then give reduce_zero_label=true"
        elif not self.reduces and max(found) < IGNORED:
            hint += ", or give the value of each class: mask_values=[0,...]"
        return (
            f"with {len(self.names)} classes and reduce_zero_label={self.reduces} they must be {first} to {last}, "
            f"or {none} for no class; {hint}"
        )

    def explain_unlabeled(self, counts: MaskCounts) -> str:
        """What to do if no pixel has a class."""
        if self.reduces and counts.pixels[IGNORED] and counts.pixels[0] and len(self.used) == 2:
            return "they are 0 and 255: give mask_values=[0,255]"
        return f"is reduce_zero_label={self.reduces} right?"


def setting(dataset: Any, kind: Any, name: str) -> Any:
    """The data set's own value of a key, or the default of its type."""
    if dataset.get(name) is not None:
        return dataset[name]
    known = (inspect.signature(base.__init__).parameters for base in kind.__mro__)
    return next(parameters[name].default for parameters in known if name in parameters)
