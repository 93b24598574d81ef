"""Names of classes in the order of their labels, from a file of one name a line."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from data.names import read_lines, readable

CLASSES_FILE = "classes.txt"  # next to shards


def read_classes(path: Path) -> tuple[str, ...]:
    """Names of classes, one a line.

    Raises:
        ValueError: there are none, or a line is empty or there twice.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; it should have the name of a class in each line")
    names = read_lines(path)
    if not names:
        raise ValueError(f"{path}: is empty; it should have the name of a class in each line")
    first: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not name.strip():
            raise ValueError(f"{path}, line {number}: is empty; each line is the name of a class: delete it")
        before = first.setdefault(same_name(name), number)
        if before != number:
            raise ValueError(f"{path}, line {number}: '{name}' is on line {before} already: delete one of them")
    return tuple(names)


def read_classes_of_shards(folder: Path) -> tuple[str, ...]:
    """The names in the list next to shards, whoever wrote it; none without a list."""
    path = folder / CLASSES_FILE
    names = read_lines(path) if path.exists() else []
    while names and not names[-1]:
        del names[-1]
    return tuple(names)


def number_classes(classes: Sequence[str]) -> dict[str, int]:
    """The label of each class, by `same_name`."""
    return {same_name(name): label for label, name in enumerate(classes)}


def same_name(name: str) -> str:
    """What two names of a class have in common: macOS writes an accent as a character of its own."""
    return unicodedata.normalize("NFC", readable(name))
