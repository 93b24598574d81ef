"""One pass over samples in order, each exactly once, with the same number of batches on every rank."""

import contextlib
import functools
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data.decode import decode
from data.image_file import BadImage
from data.image_folder import Samples, reader_of
from data.index import Index
from data.multi_labels import LabelReader
from data.pixel_format import RGB, PixelFormat, empty_images
from data.remote_reading import announced, check_room, fetching, shard_steps
from data.scan import NO_LABEL
from data.transforms import center_crop
from data.workers import IN_FLIGHT, in_workers

AHEAD = 8  # shards of a store to fetch beyond those needed now
PADDING = -1  # in place of a sample's index


@dataclass(frozen=True)
class EvalBatch:
    """B samples of one rank, padded after the last sample."""

    images: Tensor  # (B, H, W, C) in the format's dtype; zeros where there is no readable image
    labels: Tensor  # int64 (B,), -1 = none; float32 (B, C), 1 or 0, for sets with label lists if C was given
    samples: Tensor  # int64 (B,), index of the sample, or PADDING
    readable: Tensor  # bool (B,), false where the image could not be decoded, and for padding

    def pin_memory(self) -> "EvalBatch":
        """Copies the batch to page-locked memory; DataLoader's pinning thread calls this."""
        return replace(self, images=self.images.pin_memory())


class EvalLoader:
    """Yields each sample once over all ranks; batch b of rank r is part r of the b-th `world * batch` samples.

    The last batches are padded, so that all ranks do the same number of forward passes, which are collective under
    ZeRO-3. An image that cannot be decoded keeps its position in the batch.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        size: tuple[int, int],
        batch: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        subset: np.ndarray | None = None,
        border: int = 0,
        num_classes: int | None = None,
        format: PixelFormat = RGB,
    ) -> None:
        """Starts no processes.

        Args:
            samples: shards or a folder.
            size: (H, W) of the center crops.
            batch: samples per batch of one rank.
            rank, world_size: this process and how many there are.
            num_workers: processes that decode; 0 decodes in this one.
            subset: the indices of the samples to read, ascending; default: all.
            border: pixels to cut off on each side first.
            num_classes: C, the number of classes, for sets with label lists.
            format: of the images; images in other formats are not readable.

        Raises:
            ValueError: settings that cannot work; names the one to change.
        """
        if batch < 1 or min(size) < 1 or num_workers < 0:
            raise ValueError(f"batch {batch} and size {size} must be at least 1, num_workers {num_workers} at least 0")
        assert 0 <= rank < world_size
        self.samples, self.batch, self.rank, self.world_size = samples, batch, rank, world_size
        self.num_workers = num_workers
        self.indices = np.arange(len(samples)) if subset is None else np.asarray(subset, np.int64)
        assert (np.diff(self.indices) > 0).all(), "ascending, none twice"
        if isinstance(samples, Index):
            check_room(samples, 1, (2 + IN_FLIGHT * num_workers) * batch * world_size)
        self._decoder = _CropDecoder(samples, size, border, LabelReader(samples, num_classes), format)

    def __len__(self) -> int:
        """Number of batches on each rank."""
        return -(-len(self.indices) // (self.batch * self.world_size))

    def batches(self) -> Generator[EvalBatch, None, None]:
        """Yields this rank's batches; raises the errors that `Loader.batches` raises."""
        per_step, samples = self.batch * self.world_size, self.samples
        if not (isinstance(samples, Index) and samples.is_remote):
            yield from in_workers(self._decoder, self._requests(), self.num_workers, samples.root)
            return
        with fetching(samples, shard_steps(samples, self.indices, per_step), AHEAD) as fetcher:
            requests = announced(self._requests(), 0, 1, fetcher, not self.num_workers)
            batches = in_workers(self._decoder, requests, self.num_workers, samples.root, fetcher.check)
            with contextlib.closing(batches):
                for number, batch in enumerate(batches):
                    fetcher.done(number)
                    yield batch

    def _requests(self) -> Iterator[np.ndarray]:
        for number in range(len(self)):
            start = (number * self.world_size + self.rank) * self.batch
            part = self.indices[start : start + self.batch]
            yield np.pad(part, (0, self.batch - len(part)), constant_values=PADDING)


def crop_fraction(size: tuple[int, int]) -> float:
    """Share of the short side to crop: 224 of 256 up to 224 pixels, all of it above, as in MAE's and LoMaR's code."""
    return 224 / 256 if min(size) <= 224 else 1.0


class _CropDecoder:
    """Decodes a batch; lives in the workers."""

    def __init__(
        self, samples: Samples, size: tuple[int, int], border: int, labels: LabelReader, format: PixelFormat
    ) -> None:
        self._format = format
        self._size, self._border, self._labels = size, border, labels
        self._reader = reader_of(samples)
        self._box = functools.partial(center_crop, aspect=size[1] / size[0], fraction=crop_fraction(size))

    def __call__(self, indices: np.ndarray) -> EvalBatch:
        images = empty_images(len(indices), *self._size, format=self._format)
        pixels, readable = images.numpy(), np.zeros(len(indices), bool)
        pixels[:] = 0
        labels = self._labels(indices)
        labels[indices == PADDING] = 0 if labels.ndim == 2 else NO_LABEL
        for i, sample in enumerate(indices.tolist()):
            if sample == PADDING:
                continue
            try:
                data = self._reader.read(sample)
                pixels[i] = decode(data, self._box, self._size, border=self._border, format=self._format)
                readable[i] = True
            except BadImage:
                pass  # stays zeros, and `readable` stays false
        return EvalBatch(
            images, torch.from_numpy(labels), torch.from_numpy(indices.astype(np.int64)), torch.from_numpy(readable)
        )
