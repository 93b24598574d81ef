"""The index of shards: loaded, or built once and stored next to them: ``python -m data.index SHARDS``.

On first use it is built from tar headers alone. This command, `data.pack` and `data.verify --reindex` also read the
images, to store the checksums that are compared whenever an image is read.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from data.class_list import read_classes_of_shards
from data.file_lock import NotWritableError, locked
from data.index_file import Index, check_names, check_unchanged, digest_of, is_current, read_index, write_index
from data.index_scan import scan_shards
from data.parallel import report_errors
from data.remote_index import build_remote_index, load_remote_index
from data.shard_files import find_shards
from data.storage.cache import CacheSettings, cache_home
from data.storage.client import Object
from data.storage.location import is_url


def load_index(shards: str | Path, cache: CacheSettings | None = None) -> Index:
    """Loads the index of a set of shards; builds it on first use, except for shards in a store.

    Safe to call from many processes at once: one builds, the others wait. If the shards' folder is read-only the index
    goes to ``$XDG_CACHE_HOME/lomar-deepspeed`` (``~/.cache`` by default).

    Args:
        shards: a folder of ``*.tar``, one tar, or a brace pattern such as ``/x/train-{000000..000099}.tar``; local or
            at a URL such as ``s3://bucket/folder``.
        cache: where shards of a store are kept.

    Raises:
        ValueError: no shards, or shards that are not usable or no longer match the index; the message says which and
            what to do.
    """
    if is_url(shards):
        return load_remote_index(str(shards), cache or CacheSettings())
    root, names = find_shards(shards)
    for path in index_paths(shards):
        if is_current(path, read_classes_of_shards(root)):
            return _checked(read_index(path, root), root, path, names)
    return build_index(shards)


def build_index(shards: str | Path, *, checksums: bool = False) -> Index:
    """Builds and publishes the index, or loads one that another process publishes meanwhile; raises like `load_index`.

    Args:
        shards: as in `load_index`, but local.
        checksums: also read the images, for `Index.checksum`; an index without checksums is rebuilt.
    """
    root, names = find_shards(shards)
    for path in index_paths(shards):
        with suppress(NotWritableError), locked(path):
            if not is_current(path, read_classes_of_shards(root)) or (
                checksums and read_index(path, root).checksum is None
            ):
                write_index(scan_shards(root, names, root, checksums=checksums), path)
            return _checked(read_index(path, root), root, path, names)
    raise ValueError(f"cannot write an index to {root} or to the cache: set XDG_CACHE_HOME to a writable folder")


def index_paths(shards: str | Path) -> tuple[Path, Path]:
    """Possible paths of the index of local shards: next to them, or in the cache if their folder is read-only."""
    root, names = find_shards(shards)
    # A subset of a folder has its own index, which must not be mistaken for the index of the whole folder.
    part = "" if Path(shards).expanduser().is_dir() else "-" + digest_of("\n".join(names))[:12]
    return root / f"index{part}.npz", cache_home() / digest_of(str(root)) / f"index{part}.npz"


def _checked(index: Index, root: Path, path: Path, names: tuple[str, ...]) -> Index:
    """Refuses an index if shards were added or removed or changed size: one stat per shard."""
    check_names(index, path, names)
    check_unchanged(index, path, [Object(os.stat(root / name).st_size, "") for name in index.shards])
    return index


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data.index", description=__doc__.split(":")[0])
    parser.add_argument(
        "shards", metavar="SHARDS", help="folder of *.tar, one tar, or a brace pattern, local or at a URL"
    )
    args = parser.parse_args(argv)

    def command() -> int:
        if is_url(args.shards):
            index, where = build_remote_index(args.shards, CacheSettings())
        else:
            index = build_index(args.shards, checksums=True)
            where = str(index.file)
        print(f"{len(index)} samples in {len(index.shards)} shards; the index is {where}")
        return 0

    return report_errors(command)


if __name__ == "__main__":
    sys.exit(main())
