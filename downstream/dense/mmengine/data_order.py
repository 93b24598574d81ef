"""Order and seeds of mmengine's training data, so that a resumed training is bit-identical to an uninterrupted one.

mmengine draws augmentations from its workers' generators, and the model's random choices (sampled regions, drop path)
from the process's generators; it saves neither. Here both are seeded from the progress of the training: from (seed,
epoch, image) before an image is read, and from (seed, iteration, rank) before a forward pass. So no generator state
needs to be saved, and a training can stop in the middle of an epoch as well as at its end.
"""

from collections.abc import Iterator
from typing import Any

from mmengine.config import Config
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.registry import DATA_SAMPLERS, DATASETS, FUNCTIONS
from torch.utils.data import BatchSampler, Dataset, Sampler

from data.workers import ignore_signals
from downstream.dense.mmengine.dataset_keys import SPLITS
from pretrain.trainer.seed import seed_step


class SeededIndex(int):
    """The index of an image, along with the number that seeds its augmentations.

    Attributes:
        epoch: the number of the epoch, or of the batch if the order is infinite.
    """

    epoch: int

    def __new__(cls, index: int, epoch: int) -> "SeededIndex":
        seeded = super().__new__(cls, index)
        seeded.epoch = epoch
        return seeded

    def __reduce__(self) -> tuple[Any, ...]:  # for sending it to a worker
        return SeededIndex, (int(self), self.epoch)


@DATA_SAMPLERS.register_module()
class ResumableBatches:
    """A rank's batches, as lists of `SeededIndex`, starting at any batch.

    Batches at the end of an epoch that do not fill an optimizer step are left out, because a checkpoint cannot hold a
    partial step. Each epoch is shuffled anew, so other images are left out each time.

    Args:
        sampler: mmengine's `DefaultSampler` or `InfiniteSampler`.
        batch_size: per rank.
        accumulation: batches per optimizer step.
        batches: the configuration's batch sampler, if it has one.
        drop_last: whether to leave out an incomplete batch.

    Raises:
        ValueError: another sampler, or too few images for one step.
    """

    def __init__(
        self,
        sampler: Sampler[int],
        batch_size: int,
        accumulation: int,
        batches: dict[str, Any] | None = None,
        drop_last: bool = False,
    ):
        if not isinstance(sampler, DefaultSampler | InfiniteSampler):
            raise ValueError(
                f"train_dataloader.sampler.type={type(sampler).__name__} cannot be resumed midway: use "
                f"DefaultSampler (epochs) or InfiniteSampler (iterations)"
            )
        self.sampler, self.batch_size, self.accumulation = sampler, batch_size, accumulation
        self.batches = (
            DATA_SAMPLERS.build(batches, default_args={"sampler": sampler, "batch_size": batch_size})
            if batches
            else BatchSampler(sampler, batch_size, drop_last)
        )
        self.infinite = isinstance(sampler, InfiniteSampler)
        self.start = 0  # the number of the first batch of the next pass
        if not len(self):
            raise ValueError(
                f"an epoch has {len(self.batches)} batches per rank, fewer than optim_wrapper.accumulative_counts="
                f"{accumulation}: use smaller batches or fewer ranks"
            )

    def __len__(self) -> int:
        return len(self.batches) // self.accumulation * self.accumulation

    def __iter__(self) -> Iterator[list[SeededIndex]]:
        start, self.start = self.start, 0
        for number, batch in enumerate(self.batches):
            if number == len(self) and not self.infinite:
                return
            if number >= start:
                epoch = number if self.infinite else self.sampler.epoch
                yield [SeededIndex(index, epoch) for index in batch]


@DATASETS.register_module()
class SeededDataset(Dataset[Any]):
    """A data set whose augmentations depend only on the seed, the epoch and the image.

    Args:
        dataset: its mmengine configuration.
        seed: of the training.
    """

    def __init__(self, dataset: dict[str, Any], seed: int):
        self.dataset, self.seed = DATASETS.build(dataset), seed

    @property
    def metainfo(self) -> dict[str, Any]:
        return dict(self.dataset.metainfo)

    def full_init(self) -> None:
        self.dataset.full_init()

    def get_data_info(self, index: int) -> dict[str, Any]:
        return dict(self.dataset.get_data_info(int(index)))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: SeededIndex) -> Any:
        seed_step(self.seed, index.epoch, int(index))
        return self.dataset[int(index)]


FUNCTIONS.register_module(module=ignore_signals)


def shield_workers(cfg: Config) -> None:
    """Makes data workers ignore signals, so that their rank can complete its step and save when told to stop."""
    for split in SPLITS:
        if loader := cfg.get(f"{split}_dataloader"):
            loader.worker_init_fn = {"type": ignore_signals.__name__}


def wrap_train_data(cfg: Config) -> None:
    """Wraps the training data of a configuration in the two classes above."""
    loader = cfg.train_dataloader
    loader.dataset = {"type": SeededDataset.__name__, "dataset": loader.dataset, "seed": cfg.randomness.seed}
    loader.batch_sampler = {
        "type": ResumableBatches.__name__,
        "batches": loader.get("batch_sampler"),
        "accumulation": cfg.optim_wrapper.accumulative_counts,
        "drop_last": loader.pop("drop_last", False),
    }
    if not by_epoch(cfg):
        cfg.train_cfg.fast_forward_on_resume = True  # otherwise mmengine would load all skipped images again


def by_epoch(cfg: Config) -> bool:
    """Whether the training is counted in epochs, not iterations; raises ValueError if `train_cfg` says neither."""
    if not {"by_epoch", "type"} & cfg.train_cfg.keys():
        raise ValueError(
            f"train_cfg={dict(cfg.train_cfg)} has neither type nor by_epoch: override its keys one by one, for example "
            f"train_cfg.max_epochs=25"
        )
    return bool(cfg.train_cfg.get("by_epoch", cfg.train_cfg.get("type", "").startswith("EpochBased")))
