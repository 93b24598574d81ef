"""Images that a model is applied to, labeled or not, and tables about them."""

import csv
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from data.eval_loader import EvalLoader
from data.image_folder import Folder, Samples, load_samples
from data.index import Index
from data.keys import Keys
from data.names import readable
from data.scan import ARRAY_EXTENSION, IMAGE_EXTENSIONS, NO_LABEL
from pretrain.trainer.per_sample import unreadable_keys

MAX_LISTED_KEYS = 20


def load_images(*paths: str | Path) -> Samples:
    """Loads image files, or one folder with images at any depth, or one set of shards; labels are not needed.

    Raises:
        ValueError: they are none of these.
    """
    files = [Path(path) for path in paths]
    for file in files:
        if not file.exists() and "{" not in str(file):
            raise ValueError(f"{file} does not exist: give images, a folder of images or shards")
    if len(files) == 1 and (not files[0].is_file() or ".tar" in files[0].suffixes):
        return load_samples(files[0])
    for file in files:
        if not file.is_file() or file.suffix.lower().lstrip(".") not in (*IMAGE_EXTENSIONS, ARRAY_EXTENSION):
            raise ValueError(
                f"{file} is not an image ({', '.join(IMAGE_EXTENSIONS)}): give image files, one folder, or one set of "
                f"shards"
            )
    root = Path(os.path.commonpath([file.absolute().parent for file in files]))
    names = [file.absolute().relative_to(root) for file in files]
    return Folder(
        root=root,
        names=Keys.of([str(name) for name in names]),
        keys=Keys.of([str(name.with_suffix("")) for name in names]),
        label=np.full(len(files), NO_LABEL, np.int32),
        classes=(),
    )


def sample_name(samples: Samples, sample: int) -> str:
    r"""A sample's key in shards, or a file's path below its folder; bytes that are not UTF-8 as in ``na\xefve``."""
    return readable(samples.keys[sample] if isinstance(samples, Index) else samples.names[sample])


def count_images(loader: EvalLoader, readable: Tensor, consequence: str) -> dict[str, int]:
    """Counts all images, and those that cannot be decoded; the main rank lists the latter on stderr.

    Args:
        loader: that the images came from.
        readable: bool (N,), whether each of its images could be decoded.
        consequence: what becomes of the others, for the message.
    """
    keys = unreadable_keys(loader, readable)
    if keys and loader.rank == 0:
        more = f" and {len(keys) - MAX_LISTED_KEYS} more" if len(keys) > MAX_LISTED_KEYS else ""
        print(
            f"{len(keys)} of {len(readable)} images cannot be decoded and {consequence}: "
            f"{', '.join(keys[:MAX_LISTED_KEYS])}{more}",
            file=sys.stderr,
        )
    return {"images": len(readable), "skipped": len(keys)}


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a table that spreadsheets and pandas can read."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
