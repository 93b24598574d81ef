"""Images in folders, read in place: for evaluation sets, which need not be packed."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.image_file import check_length
from data.index import Index, load_index
from data.keys import Keys
from data.multi_labels import MultiLabels
from data.names import readable
from data.reader import ShardReader
from data.shard_files import holds_shards
from data.sources import list_source
from data.storage.cache import CacheSettings
from data.storage.location import is_url


@dataclass(frozen=True, eq=False)
class Folder:
    """N image files; used like an ``Index`` of shards."""

    root: Path
    names: Keys  # N paths relative to `root`
    keys: Keys  # N, the keys that `data.pack` would give them; a.jpg and a.png have the same key
    label: np.ndarray  # int32 (N,), -1 = none
    classes: tuple[str, ...]  # names of the labels: the class folders, sorted
    multi_labels: MultiLabels | None = None  # files have none
    label_problem: str = ""

    def __len__(self) -> int:
        return len(self.label)


Samples = Index | Folder


class FolderReader:
    """Like ``ShardReader``, for single files."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def read(self, sample: int) -> bytes:
        """Reads the file's bytes.

        Raises:
            BadImage: it is empty, or larger than any image.
            ValueError: it no longer exists.
        """
        name = self.folder.names[sample]
        path = os.path.join(os.fsencode(self.folder.root), name.encode("utf-8", "surrogateescape"))  # in any locale
        try:
            with open(path, "rb") as file:
                check_length(os.fstat(file.fileno()).st_size)
                return file.read()
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.folder.root}/{readable(name)}: the file has disappeared since it was listed: put it back"
            ) from error

    def close(self) -> None:
        """Nothing is kept open."""


def load_samples(path: str | Path, cache: CacheSettings | None = None) -> Samples:
    """Loads shards (a folder of ``*.tar``, one tar, a brace pattern; also at a URL) or a folder of images.

    Raises:
        ValueError: it is neither.
    """
    if is_url(path):
        return load_index(path, cache)
    folder = Path(path).expanduser()
    if folder.is_dir() and not holds_shards(folder):
        return list_folder(folder)
    return load_index(path, cache)


def list_folder(path: Path) -> Folder:
    """Lists the images of a folder; raises ValueError if there are none."""
    source = list_source(path, unique_keys=False)
    return Folder(
        root=source.root,
        names=Keys.of([file.name for file in source.files]),
        keys=Keys.of([file.key for file in source.files]),
        label=np.array([file.label for file in source.files], np.int32),
        classes=source.classes,
    )


def reader_of(samples: Samples) -> ShardReader | FolderReader:
    return ShardReader(samples) if isinstance(samples, Index) else FolderReader(samples)
