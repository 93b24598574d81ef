"""Class names in the order of their labels, from a file with one name per line."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from data.names import read_lines, readable

CLASSES_FILE = "classes.txt"  # next to shards


def read_classes(path: Path) -> tuple[str, ...]:
    """Reads class names, one per line.

    Raises:
        ValueError: there are none, or a line is empty or a duplicate.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; it should have one class name per line")
    names = read_lines(path)
    if not names:
        raise ValueError(f"{path}: is empty; it should have one class name per line")
    first: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if not name.strip():
            raise ValueError(f"{path}, line {number}: is empty; each line is a class name: delete it")
        before = first.setdefault(same_name(name), number)
        if before != number:
            raise ValueError(f"{path}, line {number}: '{name}' is already on line {before}: delete one of them")
    return tuple(names)


def read_classes_of_shards(folder: Path) -> tuple[str, ...]:
    """Reads the names in the list next to shards, whoever wrote it; none without a list."""
    path = folder / CLASSES_FILE
    names = read_lines(path) if path.exists() else []
    while names and not names[-1]:
        del names[-1]
    return tuple(names)


def number_classes(classes: Sequence[str]) -> dict[str, int]:
    """Maps each class, normalized by `same_name`, to its label."""
    return {same_name(name): label for label, name in enumerate(classes)}


def same_name(name: str) -> str:
    """Normalizes a class name, since macOS writes an accent as a separate character."""
    return unicodedata.normalize("NFC", readable(name))
