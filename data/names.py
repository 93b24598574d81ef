"""Names of files and classes as text: the same text everywhere, whatever their bytes on disk."""

from collections.abc import Sequence
from pathlib import Path

SHOWN = 10  # names in a message


def readable(name: str) -> str:
    r"""A file's name as one line of valid text: bytes that are not UTF-8 as in ``na\xefve``, tabs as ``\t``."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return text.replace("\n", r"\n").replace("\r", r"\r").replace("\t", r"\t")


def is_utf_8(name: str) -> bool:
    """Whether a file's name is UTF-8, whatever encoding Python assumes for file names."""
    content = name.encode("utf-8", "surrogateescape")
    return content.decode("utf-8", "replace").encode() == content


def shown(names: Sequence[str]) -> str:
    """Quotes the first names, and counts the others."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"'{readable(name)}'" for name in names[:SHOWN]) + more


def read_lines(path: Path) -> list[str]:
    """Reads the lines of a UTF-8 file, with or without a byte order mark, LF or CRLF; other bytes as `readable`."""
    text = path.read_bytes().decode("utf-8-sig", "backslashreplace").replace("\r\n", "\n")
    return text.removesuffix("\n").split("\n") if text else []


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Writes what `read_lines` reads."""
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
