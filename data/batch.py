"""A micro-batch: its contents, and how it is decoded, in a worker process or in this one."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.augment import color_jitter, rand_augment, three_augment
from data.decode import Crop, decode_crops
from data.image_file import BadImage
from data.index import Index
from data.multi_labels import LabelReader
from data.order import Stream, Views, sample_rng
from data.pixel_format import PixelFormat, computable, empty_images
from data.reader import ShardReader
from data.transforms import Augmentation, flip_decision

MaskSampler = Callable[[np.random.Generator], dict[str, np.ndarray]]

MAX_REPLACEMENTS = 100
CROP_STREAMS = (Stream.CROP, Stream.SECOND_CROP)  # one per view of a sample


def draw_masks(sampler: MaskSampler, seed: int, views: Iterable[tuple[int, int]]) -> dict[str, Tensor]:
    """Draws the mask sampler's arrays for B views (epoch, sample), at least one, stacked: (B, ...)."""
    masks = [sampler(sample_rng(seed, epoch, sample, Stream.MASK)) for epoch, sample in views]
    return {name: torch.from_numpy(np.stack([mask[name] for mask in masks])) for name in masks[0]}


class SizedUntil(NamedTuple):
    """Image size and mask sampler of the views before an epoch, where they differ from the final ones."""

    epoch: int  # the first epoch that this no longer applies to
    size: tuple[int, int]  # (H, W)
    mask_sampler: MaskSampler | None


class Skipped(NamedTuple):
    """A sample that could not be decoded."""

    key: str
    kind: str  # of reason, as in `BadImage`
    reason: str


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank; B samples."""

    images: Tensor  # (B, H, W, C) in the format's dtype, or (B, 2, H, W, C) with two views per sample
    mask_indices: dict[str, Tensor]  # the mask sampler's arrays for each sample, stacked: (B, ...)
    labels: Tensor | None  # int64 (B,), -1 = none; float32 (B, C), 1 or 0, for sets with label lists; if requested
    samples: Tensor  # int64 (B,), index of the sample shown in `images`
    keys: tuple[str, ...]  # their keys
    skipped: tuple[Skipped, ...]  # the samples that could not be decoded and were replaced

    def model_inputs(self) -> dict[str, Tensor | dict[str, Tensor]]:
        """Returns the trained module's arguments besides the images: labels if there are any, else mask indices."""
        return {"mask_indices": self.mask_indices} if self.labels is None else {"labels": self.labels}

    def to(self, device: torch.device) -> "Batch":
        """Copies the batch to a device, where uint16 images become `computable`."""
        return self._map(lambda tensor: computable(tensor.to(device, non_blocking=True)))

    def pin_memory(self) -> "Batch":
        """Copies the batch to page-locked memory; DataLoader's pinning thread calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            images=move(self.images),
            mask_indices={name: move(tensor) for name, tensor in self.mask_indices.items()},
            labels=None if self.labels is None else move(self.labels),
        )


class MicroBatchDecoder:
    """Decodes a micro-batch; lives in the workers."""

    def __init__(
        self,
        index: Index,
        stages: Sequence[SizedUntil],
        seed: int,
        augmentations: Sequence[Augmentation],
        labels: LabelReader | None,
        format: PixelFormat,
        within_shard: bool,
    ) -> None:
        self._index, self._stages, self._seed, self._labels = index, stages, seed, labels
        self._augmentations, self._format, self._within_shard = augmentations, format, within_shard
        self._reader = ShardReader(index)

    def __call__(self, views: Views) -> Batch:
        samples, stage = views.samples, next(s for s in self._stages if views.epochs[0] < s.epoch)
        images = empty_images(len(samples), len(self._augmentations), *stage.size, format=self._format)
        pixels = images.numpy()
        shown, skipped = samples.copy(), []
        starts = np.flatnonzero(np.diff(samples, prepend=-1))
        for start, stop in pairwise([*starts.tolist(), len(samples)]):  # views of one sample, which is decoded once
            sample, epochs = int(samples[start]), views.epochs[start:stop].tolist()
            shown[start:stop], problem = self._decode_or_replace(epochs, sample, pixels[start:stop])
            if problem:
                skipped += [problem] * len(epochs)
        labels = torch.from_numpy(self._labels(shown)) if self._labels is not None else None
        return Batch(
            images=images.squeeze(1),
            mask_indices=self._sample_masks(stage.mask_sampler, views),
            labels=labels,
            samples=torch.from_numpy(shown),
            keys=tuple(self._index.keys[sample] for sample in shown.tolist()),
            skipped=tuple(skipped),
        )

    def _decode_or_replace(self, epochs: Sequence[int], sample: int, out: np.ndarray) -> tuple[int, Skipped | None]:
        """Writes the sample's views, or those of the next sample that can be decoded, into ``out``.

        Args:
            epochs: the R epochs whose draws the sample gets.
            out: (R, views, H, W, C).

        Returns:
            The sample that was decoded, and why the requested one was not (None if it was).
        """
        first: Skipped | None = None
        start, count = 0, len(self._index)
        if self._within_shard:  # other shards may not be available
            shard = self._index.shard_of(sample)
            count = int(self._index.shard_sizes[shard])
            start = int(self._index.shard_ends[shard]) - count
        for number in range(min(MAX_REPLACEMENTS + 1, count)):
            shown = start + (sample - start + number) % count
            try:
                self._augment(epochs, sample, shown, out)
                return shown, first
            except BadImage as error:
                first = first or Skipped(self._index.keys[sample], error.kind, str(error))
        assert first is not None
        raise ValueError(
            f"sample '{first.key}' and the {number} after it cannot be decoded (the first: "
            f"{first.reason}): find them with `python -m data.verify SHARDS --decode`"
        )

    def _augment(self, epochs: Sequence[int], sample: int, shown: int, out: np.ndarray) -> None:
        """Writes all views of a sample; a replacement uses the random numbers of the sample that it replaces."""
        augmentations, rngs, crops = [*self._augmentations] * len(epochs), [], []
        size = out.shape[2:4]
        streams = product(epochs, CROP_STREAMS[: len(self._augmentations)])
        for (epoch, stream), augmentation in zip(streams, augmentations, strict=True):
            rng = sample_rng(self._seed, epoch, sample, stream)
            flipped = flip_decision(rng, augmentation.flip)  # drawn first: a crop takes a varying number of draws
            crops.append(Crop(functools.partial(augmentation.box, rng, size=size), flipped))
            rngs.append(rng)
        decoded = decode_crops(self._reader.read(shown), crops, size, format=self._format)
        views = out.reshape(-1, *out.shape[2:])
        for view, (rng, augmentation, pixels) in enumerate(zip(rngs, augmentations, decoded, strict=True)):
            if augmentation.color_jitter:
                pixels = color_jitter(rng, pixels, augmentation.color_jitter)
            if augmentation.rand_augment:
                pixels = rand_augment(rng, pixels, augmentation.rand_augment)
            views[view] = three_augment(rng, pixels) if augmentation.three_augment else pixels

    def _sample_masks(self, sampler: MaskSampler | None, views: Views) -> dict[str, Tensor]:
        if sampler is None:
            return {}
        return draw_masks(sampler, self._seed, zip(views.epochs.tolist(), views.samples.tolist(), strict=True))
