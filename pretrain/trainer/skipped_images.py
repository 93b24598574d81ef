"""Images that could not be decoded and were replaced: listed in a file, counted by kind, and refused if too many."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data.batch import Skipped
from data.image_file import count_kinds
from data.names import readable
from pretrain.trainer.append import append


class SkippedImages:
    """The skipped images of one rank, since it started."""

    def __init__(self, path: Path, limit: int | float, images_per_epoch: int) -> None:
        """Writes nothing.

        Args:
            path: of the list; all ranks append to it.
            limit: `data.max_skipped_images`: how many or, if it is a float, which share of the images that were read.
                The whole first epoch counts as read, or one bad image at the beginning would exceed any share.
            images_per_epoch: how many images this rank reads.
        """
        self._path, self._limit, self._images_per_epoch = path, limit, images_per_epoch
        self._kinds: Counter[str] = Counter()
        self._read = 0

    def add(self, skipped: Sequence[Skipped], read: int) -> int:
        """Lists the skipped images of a step that read `read` images; returns how many they are.

        Raises:
            ValueError: there are more than the limit.
        """
        self._read += read
        if not skipped:
            return 0
        lines = [f"{readable(key)}\t{kind}\t{readable(reason)}\n" for key, kind, reason in skipped]
        append(self._path, "".join(lines))  # in one write: other ranks append to it, too
        self._kinds.update(kind for _, kind, _ in skipped)
        total, limit = self._kinds.total(), self._limit
        if isinstance(limit, float):
            limit *= max(self._read, self._images_per_epoch)
        if total > limit:
            raise ValueError(
                f"{total} of {self._read} images could not be decoded ({count_kinds(self._kinds.elements())}), more "
                f"than data.max_skipped_images={self._limit}; they are listed in {self._path}: repair them, pack again "
                f"with --bad skip, or allow more"
            )
        return len(skipped)
