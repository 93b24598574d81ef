"""Where a training on mmengine is, so that it continues with the bits that it would have had.

mmengine draws augmentations from its workers' generators and what the model draws (samples of regions, drop path) from
the process's, and saves neither. Here both are seeded by where the training is: by (seed, epoch, image) before an image
is read, and by (seed, iteration, rank) before a forward pass. Then nothing random need be saved, and the middle of an
epoch is as good a place to stop as its end.
"""

from collections.abc import Iterator
from typing import Any

from mmengine.config import Config
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.registry import DATA_SAMPLERS, DATASETS
from torch.utils.data import BatchSampler, Dataset, Sampler

from pretrain.trainer.loop import seed_step


class Place(int):
    """The number of an image that says when it is drawn, too: in which epoch, or in which batch of an endless order."""

    turn: int

    def __new__(cls, image: int, turn: int) -> "Place":
        place = super().__new__(cls, image)
        place.turn = turn
        return place

    def __reduce__(self) -> tuple[Any, ...]:  # on its way to a worker
        return Place, (int(self), self.turn)


@DATA_SAMPLERS.register_module()
class ResumableBatches:
    """A rank's batches, as lists of `Place`, from any batch on.

    Batches at an epoch's end that make no whole optimiser step are left out: they would be half of a step that a
    checkpoint cannot hold. The next epoch is shuffled anew, so these are other images each time.

    Args:
        sampler: mmengine's `DefaultSampler` or `InfiniteSampler`.
        batch_size: of a rank.
        accumulation: batches of an optimiser step.
        batches: the batch sampler that the configuration asks for, if any.
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
                f"train_dataloader.sampler.type={type(sampler).__name__} cannot be continued in the middle: use "
                f"DefaultSampler (epochs) or InfiniteSampler (iterations)"
            )
        self.sampler, self.batch_size, self.accumulation = sampler, batch_size, accumulation
        self.batches = (
            DATA_SAMPLERS.build(batches, default_args={"sampler": sampler, "batch_size": batch_size})
            if batches
            else BatchSampler(sampler, batch_size, drop_last)
        )
        self.endless = isinstance(sampler, InfiniteSampler)
        self.first = 0  # the next pass begins here
        if not len(self):
            raise ValueError(
                f"an epoch has {len(self.batches)} batches a rank, fewer than optim_wrapper.accumulative_counts="
                f"{accumulation}: use smaller batches or fewer ranks"
            )

    def __len__(self) -> int:
        return len(self.batches) // self.accumulation * self.accumulation

    def __iter__(self) -> Iterator[list[Place]]:
        first, self.first = self.first, 0
        for number, batch in enumerate(self.batches):
            if number == len(self) and not self.endless:
                return
            if number >= first:
                turn = number if self.endless else self.sampler.epoch
                yield [Place(image, turn) for image in batch]


@DATASETS.register_module()
class SeededDataset(Dataset[Any]):
    """A data set whose augmentations depend on the seed, the epoch and the image alone.

    Args:
        dataset: mmengine's configuration of it.
        seed: of the training.
    """

    def __init__(self, dataset: dict[str, Any], seed: int):
        self.dataset, self.seed = DATASETS.build(dataset), seed

    @property
    def metainfo(self) -> dict[str, Any]:
        return dict(self.dataset.metainfo)

    def full_init(self) -> None:
        self.dataset.full_init()

    def get_data_info(self, image: int) -> dict[str, Any]:
        return dict(self.dataset.get_data_info(int(image)))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: Place) -> Any:
        seed_step(self.seed, place.turn, int(place))
        return self.dataset[int(place)]


def wrap_train_data(cfg: Config) -> None:
    """Puts the two above around the training data of a configuration."""
    loader = cfg.train_dataloader
    loader.dataset = {"type": "PlacedImages", "dataset": loader.dataset, "seed": cfg.randomness.seed}
    loader.batch_sampler = {
        "type": "PlacedBatches",
        "batches": loader.get("batch_sampler"),
        "accumulation": cfg.optim_wrapper.accumulative_counts,
        "drop_last": loader.pop("drop_last", False),
    }
    if not by_epoch(cfg):
        cfg.train_cfg.fast_forward_on_resume = True  # mmengine's would load all images again to skip them


def by_epoch(cfg: Config) -> bool:
    """Whether a configuration counts its training in epochs; ValueError where it does not say."""
    if not {"by_epoch", "type"} & cfg.train_cfg.keys():
        raise ValueError(
            f"train_cfg={dict(cfg.train_cfg)} has neither type nor by_epoch: change keys of it one by one, for example "
            f"train_cfg.max_epochs=25"
        )
    return bool(cfg.train_cfg.get("by_epoch", cfg.train_cfg.get("type", "").startswith("EpochBased")))
