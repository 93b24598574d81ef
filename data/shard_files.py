"""Which files are the shards of a set."""

import os
from collections.abc import Collection, Iterable
from pathlib import Path

import braceexpand

from data.messages import one_or_list
from data.storage.location import Location

_COMPRESSED = {  # suffix of a compressed tar -> what decompresses it
    **dict.fromkeys((".tar.gz", ".tar.z"), "gzip -d"),
    ".tar.bz2": "bzip2 -d",
    ".tar.xz": "xz -d",
    ".tar.zst": "zstd -d --rm",
    ".tar.lz4": "lz4 -d --rm",
    ".tgz": "gzip -d",
    **dict.fromkeys((".tbz2", ".tbz"), "bzip2 -d"),
    ".txz": "xz -d",
    ".tzst": "zstd -d --rm",
}


def find_shards(shards: str | Path) -> tuple[Path, tuple[str, ...]]:
    """Returns the folder of a set of shards, absolute, and their sorted names relative to it.

    Raises:
        ValueError: there are none, or some are missing or compressed; names them.
    """
    text = os.path.expanduser(str(shards))  # the shell does not expand `data.shards=~/x`
    if Path(text).is_dir():
        folder = Path(text).absolute()
        paths = [folder / name for name in tars_of(folder, _visible_names(folder))]
    elif "{" in text:
        paths = [Path(os.path.abspath(name)) for name in braceexpand.braceexpand(text)]
    else:
        paths = [Path(os.path.abspath(text))]
    if not paths:
        below = next(Path(text).glob("*/*.tar"), None)
        advice = "; `python -m data.pack` makes them from images"
        if below:
            advice = f", but in its subfolders, such as {below}: give one of them, or a pattern with {{braces}}"
        raise ValueError(f"{text}: no shards (*.tar) in this folder{advice}")
    missing = [path for path in paths if not path.is_file()]
    if missing and any(sign in text for sign in "*?"):
        raise ValueError(
            f"{text}: use a pattern with braces, as in train-{{000000..000099}}.tar, or give a folder of *.tar"
        )
    if missing:
        count = f"{len(missing)} of {len(paths)} missing"
        problems = [f"{path}: no such shard ({count}); give a folder of *.tar" for path in missing]
        raise ValueError(one_or_list(problems, f"shards are missing, {count}:"))
    refuse_compressed(paths, len(paths))
    root = Path(os.path.commonpath([path.parent for path in paths]))
    return root, tuple(sorted({path.relative_to(root).as_posix() for path in paths}))


def tars_below(root: Path, shards: Collection[str]) -> int:
    """Counts the tars in folders directly below `root` that are not among its shards: nothing looks for them there."""
    below = {path.relative_to(root).as_posix() for path in root.glob("[!.]*/*.tar")}
    return len(below.difference(shards))


def holds_shards(folder: Path) -> bool:
    """Whether a folder has shards in it, compressed or not."""
    return any(name.lower().endswith(".tar") or _suffix_of_compressed(name) for name in _visible_names(folder))


def _visible_names(folder: Path) -> list[str]:
    """The names in a folder that are not hidden; macOS writes `._x.tar`, with metadata, beside x.tar."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def tars_of(folder: Location, names: Collection[str]) -> list[str]:
    """Returns the shards among a folder's visible files, sorted; refuses compressed ones, which would be left out."""
    tars = {name for name in names if name.lower().endswith(".tar")}
    compressed = []
    for name in names:
        suffix = _suffix_of_compressed(name)
        if suffix and name[: -len(suffix)] + ".tar" not in tars:
            compressed.append(folder / name)
    refuse_compressed(compressed, len(tars) + len(compressed))
    return sorted(tars)


def _suffix_of_compressed(name: str) -> str:
    return next((suffix for suffix in _COMPRESSED if name.lower().endswith(suffix)), "")


def refuse_compressed(paths: Iterable[Location], shards: int) -> None:
    """Raises ValueError if any of the paths is compressed; `shards` is the number of all shards, for the message."""
    compressed = [path for path in paths if _suffix_of_compressed(path.name)]
    if not compressed:
        return
    command = _COMPRESSED[_suffix_of_compressed(compressed[0].name)]
    shown = ", ".join([*(path.name for path in compressed[:5]), *(["..."] if len(compressed) > 5 else [])])
    raise ValueError(
        f"{compressed[0].parent}: {len(compressed)} of {shards} shards are compressed ({shown}), but training reads "
        f"from the middle of a tar: decompress them first, for example `{command} {compressed[0]}`"
    )
