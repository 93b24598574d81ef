"""Text files of ``path[<TAB>label]`` lines: which files to pack, and their labels."""

import os
import stat
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data.class_list import number_classes, same_name
from data.names import is_utf_8, readable
from data.scan import IMAGE_EXTENSIONS, NO_LABEL

MAX_LABEL = 2**31 - 1
SHOWN_PROBLEMS = 5
_UTF_8_MARK, _UTF_16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")


class ListedFile(NamedTuple):
    """A line of a list."""

    name: str  # relative to the list's folder, or absolute
    label: int  # NO_LABEL = none
    stat: os.stat_result


def read_list(path: Path, classes: Sequence[str] | None = None, labels: bool = True) -> list[ListedFile]:
    """Reads the files of a list.

    Args:
        path: of the list. Its paths are bytes, as in the file system; ``~`` is the home folder.
        classes: class names that labels may have in place of their numbers.
        labels: False reads only the paths.

    Raises:
        ValueError: it is not such a list, or lines are wrong; quotes the first of them.
    """
    _refuse_other_files(path)
    content = path.read_bytes().removeprefix(_UTF_8_MARK)
    numbers = None if classes is None else number_classes(classes)
    files: list[ListedFile] = []
    first: dict[str, int] = {}
    problems = []
    lines = content.splitlines()
    for position, line in enumerate(tqdm(lines, "listing", unit="file", disable=None, delay=2), start=1):
        text = os.fsdecode(line)
        if not text.strip():
            continue
        try:
            file = _listed(path.parent, text, numbers, labels)
            before = first.setdefault(os.path.normpath(file.name), position)
            if before != position:
                raise ValueError(f"'{readable(file.name)}' is already on line {before}: delete one of them")
            files.append(file)
        except ValueError as error:
            suffix = os.path.splitext(text.partition("\t")[0])[1].lower().lstrip(".")
            header = position == 1 and suffix not in IMAGE_EXTENSIONS
            problems.append(f"line {position}: {error}{'; if it is a header, delete the line' if header else ''}")
    if problems:
        more = f"\n  ... and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise ValueError(
            f"{path}: {len(problems)} of {len(lines)} lines are invalid; each must be a path, or path<TAB>label:"
            + "".join(f"\n  {problem}" for problem in problems[:SHOWN_PROBLEMS])
            + more
        )
    return files


def _listed(folder: Path, text: str, numbers: Mapping[str, int] | None, labels: bool) -> ListedFile:
    name, tab, label = text.rpartition("\t") if "\t" in text else (text, "", "")
    found = _stat(folder, name)
    if found is None and tab and (found := _stat(folder, text)):
        name, label = text, ""  # a tab in the path, and no label
    if found is None and name.startswith("~"):
        name = os.path.expanduser(name)
        found = _stat(folder, name)
    if found is None:
        raise ValueError(f"'{readable(name)}': no such file{_advice(folder, name)}")
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"'{readable(name)}' is not a file")
    if not os.access(folder / name, os.R_OK):
        raise ValueError(f"'{readable(name)}': no permission to read it: `chmod +r` gives it")
    name = name.removeprefix("./")  # as `find .` writes it
    return ListedFile(name, _label(label.strip(), numbers) if labels else NO_LABEL, found)


def _stat(folder: Path, name: str) -> os.stat_result | None:
    try:
        return os.stat(folder / name)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _advice(folder: Path, name: str) -> str:
    """Guesses what a path that does not exist was meant to be."""
    bare = name.strip().strip("\"'")
    if bare != name and _stat(folder, bare):
        return "; write the path without quotes and spaces around it"
    for separator, called in ((",", "a comma"), (";", "a semicolon"), (" ", "a space"), ("\t", "a second tab")):
        parts = (name.partition(separator)[0], name.rpartition(separator)[0]) if separator in name else ()
        if any(part and _stat(folder, part.strip("\"'")) for part in parts):
            return f"; {called} follows the path, where a tab and the label alone should be"
    if "\\" in name and _stat(folder, name.replace("\\", "/")):
        return "; write / instead of \\"
    if not is_utf_8(name):
        return "; the line is not UTF-8: save the list as UTF-8"
    if os.path.exists(name):
        return (
            f"; paths are relative to the list's folder, but this one is relative to {os.getcwd()}: move the list there"
        )
    return "" if os.path.isabs(name) else f" in {folder}"


def _label(text: str, numbers: Mapping[str, int] | None) -> int:
    """Returns a label's number; the name of a class is taken as a name, even if it is a number."""
    if not text:
        return NO_LABEL
    if numbers is not None and (label := numbers.get(same_name(text))) is not None:
        return label
    if not text.isdecimal():
        advice = (
            "is not in --classes"
            if numbers is not None
            else "is not a number from 0 on; to use names as labels, give --classes FILE with all names in label "
            "order, one per line"
        )
        raise ValueError(f"the label '{readable(text)}' {advice}")
    most = MAX_LABEL if numbers is None else len(numbers) - 1
    if int(text) > most:
        raise ValueError(f"the label {text} exceeds {most}{', the last class of --classes' if numbers else ''}")
    return int(text)


def _refuse_other_files(path: Path) -> None:
    if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS:
        raise ValueError(f"{path} is an image: give its folder, or a list")
    if tarfile.is_tarfile(path):
        raise ValueError(f"{path} is a tar: unpack it first; if it is already a shard, use it as data.shards")
    if zipfile.is_zipfile(path):
        raise ValueError(f"{path} is a zip: unpack it first and give the folder")
    with open(path, "rb") as file:
        beginning = file.read(4096)
    if beginning.startswith(_UTF_16_MARKS):
        raise ValueError(f"{path}: is UTF-16: save the list as UTF-8")
    if b"\0" in beginning:
        raise ValueError(f"{path}: not a text file: give a folder of images, or a list of path[<TAB>label] lines")
