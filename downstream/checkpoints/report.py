"""What became of every key of a file, for people to read."""

import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(repr=False)
class Report:
    """What became of every key of a file; printed with a line for each reason.

    Attributes:
        path, weights: the file, and which of its weights were read; see `files.Source`.
        library: that the names of its keys come from.
        pixels: what is known about the pixels that it was trained on.
        used: parameter of the encoder -> the file's keys that it was made of.
        folded, resized: parameter of the encoder -> what was done to it.
        dropped: key of the file -> why.
    """

    path: Path
    weights: str
    library: str = ""
    pixels: str = ""
    used: dict[str, tuple[str, ...]] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    resized: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.weights} weights)"]
        lines.append(f"  used     {len({key for keys in self.used.values() for key in keys})} keys")
        lines[-1] += f" under {self.library} names" if self.library else ""
        lines += [f"  pixels   {self.pixels}"] if self.pixels else []
        for title, reasons in (("folded", self.folded), ("resized", self.resized), ("dropped", self.dropped)):
            by_reason: dict[str, list[str]] = {}
            for key, reason in reasons.items():
                by_reason.setdefault(reason, []).append(key)
            for reason, keys in by_reason.items():
                names = list(dict.fromkeys(_any_block(key) for key in keys))
                shown = ", ".join(names[:3]) + (", ..." if names[3:] else "")
                lines.append(f"  {title:8} {len(keys)} ({shown}): {reason}")
        return "\n".join(lines)


def group_problems(problems: dict[str, str]) -> str:
    """Keys and why they cannot be used; those that differ only in the block number share a line."""
    groups = {(_any_block(key), why): None for key, why in problems.items()}
    return "\n".join(f"  {key}: {why}" for key, why in groups)


def _any_block(key: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", key)
