"""Batches for one rank, made by worker processes.

Their contents depend only on (seed, step, global batch, repeats, group size).
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from itertools import islice

from data.batch import Batch, MaskSampler, MicroBatchDecoder, SizedUntil
from data.index import Index
from data.multi_labels import LabelReader
from data.order import Groups, Views, check_divisible, group_steps, rank_views, steps_per_epoch
from data.pixel_format import RGB, PixelFormat
from data.remote_reading import announced, check_room, fetching
from data.transforms import Augmentation
from data.workers import IN_FLIGHT, in_workers


class Loader:
    """Global steps of micro-batches, in an order that does not depend on ranks, workers or accumulation.

    Attributes:
        steps_per_epoch: optimizer steps in an epoch; from the index alone, so equal on all ranks.
        sizes: each size (H, W) that images have, with the first step that has it: (step, size).
    """

    def __init__(
        self,
        index: Index,
        *,
        size: tuple[int, int],
        batch: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int,
        mask_sampler: MaskSampler | None = None,
        augmentations: Sequence[Augmentation] = (Augmentation(),),
        labels: bool = False,
        num_classes: int | None = None,
        num_workers: int = 0,
        repeats: int = 1,
        earlier: Sequence[SizedUntil] = (),
        format: PixelFormat = RGB,
        shuffle_shards: int = 0,
    ) -> None:
        """Checks the settings; starts no processes.

        Args:
            index: the samples.
            size: final (H, W) of the images.
            batch, accumulation: samples of an optimizer step, over all ranks, and its micro-batches.
            rank, world_size: this process and how many there are.
            seed: of all random numbers, at least 0.
            mask_sampler: draws a sample's arrays, of the same shapes for every sample; picklable if workers are not
                forked.
            augmentations: one per view of a sample, one or two.
            labels: whether batches have labels; a sample that replaces another one keeps its own label.
            num_classes: C, the number of classes; needed for the labels of sets with label lists.
            num_workers: processes that decode; 0 decodes in this one.
            repeats: views that one decode of a sample serves; see ``rank_views``.
            earlier: what replaces ``size`` and ``mask_sampler`` until an epoch, in the order of these epochs, which are
                multiples of ``repeats``. So a pass over the samples, and hence a step, has views of one size.
            format: of the images; images in other formats are replaced like damaged ones.
            shuffle_shards: shards per group whose samples are shuffled together; 0 shuffles all samples.

        Raises:
            ValueError: settings that cannot work; names the one to change.
        """
        check_divisible(batch, world_size, accumulation)
        _check_numbers(size, seed, num_workers)
        assert 0 <= rank < world_size
        epochs = [stage.epoch for stage in earlier]
        assert epochs == sorted({*epochs})
        assert all(epoch % repeats == 0 for epoch in epochs)
        self.steps_per_epoch = steps_per_epoch(len(index), batch)
        begins, sizes = [0, *epochs], [*(stage.size for stage in earlier), size]
        self.sizes = [(begin * self.steps_per_epoch, size) for begin, size in zip(begins, sizes, strict=True)]
        self._index, self._seed, self._batch, self._accumulation = index, seed, batch, accumulation
        self._rank, self._world_size, self._num_workers, self._repeats = rank, world_size, num_workers, repeats
        self._groups = Groups(index.shard_sizes, shuffle_shards)
        steps_in_flight = 2 + -(-IN_FLIGHT * num_workers // accumulation)  # ranks may be a step apart
        check_room(index, shuffle_shards, -(-steps_in_flight * batch // repeats))
        stages = [*earlier, SizedUntil(sys.maxsize, size, mask_sampler)]
        reader = _label_reader(index, num_classes) if labels else None
        self._decoder = MicroBatchDecoder(index, stages, seed, augmentations, reader, format, shuffle_shards > 0)

    def size_at(self, step: int) -> tuple[int, int]:
        """(H, W) of the images in a global step."""
        return next(size for begin, size in reversed(self.sizes) if step >= begin)

    def batches(self, start_step: int, end_step: int) -> Iterator[list[Batch]]:
        """Yields this rank's ``accumulation`` micro-batches for each step from ``start_step`` up to ``end_step``.

        Global step s is step ``s % steps_per_epoch`` of epoch ``s // steps_per_epoch``. One set of workers serves the
        whole range; leaving the loop early stops them.

        Raises:
            ValueError: the shards do not match the index, or too many samples in a row cannot be decoded.
            ChildProcessError, TimeoutError: a worker died, or its storage stopped answering.
        """
        steps = range(start_step, end_step)
        if not steps:
            return
        plan = group_steps(self._groups, self._seed, steps, self._batch, self._repeats)
        with fetching(self._index, plan) as fetcher:
            requests = announced(self._requests(steps), start_step, self._accumulation, fetcher, not self._num_workers)
            batches = in_workers(self._decoder, requests, self._num_workers, self._index.root, fetcher.check)
            with contextlib.closing(batches):
                for step in steps:
                    micro_batches = list(islice(batches, self._accumulation))
                    fetcher.done(step)
                    yield micro_batches

    def _requests(self, steps: range) -> Iterator[Views]:
        return rank_views(
            len(self._index),
            self._seed,
            steps,
            self._batch,
            accumulation=self._accumulation,
            rank=self._rank,
            world_size=self._world_size,
            repeats=self._repeats,
            groups=self._groups if self._groups.size else None,
        )


def _label_reader(index: Index, num_classes: int | None) -> LabelReader:
    if index.multi_labels is not None and num_classes is None:
        raise ValueError(f"samples in {index.root} have lists of labels, but this needs one label per sample")
    return LabelReader(index, num_classes)


def _check_numbers(size: tuple[int, int], seed: int, num_workers: int) -> None:
    if min(size) < 1 or seed < 0 or num_workers < 0:
        raise ValueError(
            f"size {size}, seed {seed} and num_workers {num_workers}: size must be positive, the others at least 0"
        )
