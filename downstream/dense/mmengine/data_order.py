"""Order and seeds of the training data on mmengine, so that a resumed training has the bits of one without a stop.

mmengine draws augmentations from its workers' generators and what the model draws (samples of regions, drop path) from
the process's, and saves neither. Here both are seeded by the progress of the training: by (seed, epoch, image) before
an image is read, and by (seed, iteration, rank) before a forward pass. Then no generator need be saved, and a training
can stop in the middle of an epoch as well as at its end.
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
    """The index of an image, and with it the number that seeds its augmentations.

    Attributes:
        epoch: the number of the epoch, or of the batch in an infinite order.
    """

    epoch: int

    def __new__(cls, index: int, epoch: int) -> "SeededIndex":
        seeded = super().__new__(cls, index)
        seeded.epoch = epoch
        return seeded

    def __reduce__(self) -> tuple[Any, ...]:  # to be sent to a worker
        return SeededIndex, (int(self), self.epoch)


@DATA_SAMPLERS.register_module()
class ResumableBatches:
    """A rank's batches, as lists of `SeededIndex`, from any batch on.

    Batches at an epoch's end that make no whole optimizer step are left out, since a checkpoint cannot hold a part of
    one. The next epoch is shuffled anew, so these are other images each time.

    Args:
        sampler: mmengine's `DefaultSampler` or `InfiniteSampler`.
        batch_size: of a rank.
        accumulation: batches of an optimizer step.
        batches: the configuration's batch sampler, if it has one.
        drop_last: whether a batch that is not full is left out.

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
                f"train_dataloader.sampler.type={type(sampler).__name__} cannot be resumed in the middle: use "
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
                f"an epoch has {len(self.batches)} batches a rank, fewer than optim_wrapper.accumulative_counts="
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
    """A data set whose augmentations depend on nothing but the seed, the epoch and the image.

    Args:
        dataset: its configuration, as of mmengine.
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
    """Data workers leave signals to their rank, so that a job that is told to stop can complete its step and save."""
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
        cfg.train_cfg.fast_forward_on_resume = True  # or mmengine would load all images again to skip them


def by_epoch(cfg: Config) -> bool:
    """Whether a configuration counts its training in epochs; ValueError where it says neither that nor iterations."""
    if not {"by_epoch", "type"} & cfg.train_cfg.keys():
        raise ValueError(
            f"train_cfg={dict(cfg.train_cfg)} has neither type nor by_epoch: override its keys one by one, for example "
            f"train_cfg.max_epochs=25"
        )
    return bool(cfg.train_cfg.get("by_epoch", cfg.train_cfg.get("type", "").startswith("EpochBased")))
