"""The configuration of a classifier's training; `load` makes a frozen, checked one from a recipe and overrides."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from data.pixel_format import RGB
from data.transforms import Augmentation
from pretrain.trainer.config import ModelConfig, OptimConfig, RunConfig, StartConfig
from pretrain.trainer.recipe import load_config
from pretrain.trainer.run_folder import RunFolder
from pretrain.trainer.schema import MAY_CHANGE, Section, Share

RECIPES = Path(__file__).parent / "recipes"
ELSEWHERE = {"pretrain/run.py": Path(__file__).parents[2] / "pretrain" / "recipes"}


class FinetuneModelConfig(ModelConfig):
    """The encoder, also with the positions of other projects' encoders."""

    position: Literal["relative", "sincos", "bias"] = Field(  # type: ignore[assignment]
        "relative",
        description="sincos: any absolute table, fixed like MAE's or learned; bias: a table per block, like BEiT's",
    )


class FinetuneStartConfig(StartConfig):
    """Where the encoder's weights come from (an encoder or a classifier), and which of them are trained."""

    trained_blocks: int | None = Field(
        None,
        ge=0,
        description="train only the head and this many of the last blocks; 0: a linear probe; none: train everything",
    )


class HeadConfig(Section):
    """The classification head on the encoder."""

    num_classes: int | None = Field(
        None, ge=2, description="none: as many as data.shards has, by their names or else their labels"
    )
    kind: Literal["linear", "batchnorm"] = Field(
        "linear", description="batchnorm: standardize the features over the batch first, as in MAE's linear probe"
    )
    pool: Literal["avg", "token"] = Field("avg", description="average of the patch tokens, or the class token")


class AugmentConfig(Section):
    """timm's augmentations of the training images; crop, flip and color are keys of `data`."""

    randaugment: str = Field("", description="in timm's notation, such as rand-m9-mstd0.5-inc1; empty: none")
    random_erasing: Share = Field(0.0, description="probability of replacing a rectangle with noise")
    mixup: float = Field(0.0, ge=0, description="alpha")
    cutmix: float = Field(0.0, ge=0, description="alpha; with mixup, each batch gets one of the two")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")

    @property
    def mixes(self) -> bool:
        """Whether pairs of images are mixed."""
        return self.mixup > 0 or self.cutmix > 0


class EMAConfig(Section):
    """An exponential moving average of the weights, evaluated and saved along with them."""

    decay: Share = Field(0.9999, description="share of the average that an update keeps")


class FinetuneOptimConfig(OptimConfig):
    """The optimizer and its schedule."""

    name: Literal["adamw", "lars"] = Field("adamw", description="lars: for linear probes with large batches")
    layer_decay: float = Field(1.0, gt=0, le=1, description="learning rate of a block relative to that of the next")
    momentum: Share = Field(0.9, description="for LARS")


class ValConfig(Section):
    """Validation during training."""

    shards: str = Field(min_length=1, description="the validation images: shards, or a folder of class folders")
    every_epochs: int = Field(
        1, ge=1, description="epochs between validations; the end of training is always validated"
    )
    batch_size: int = Field(128, ge=1, description="images per batch on each rank")


class FinetuneConfig(RunConfig):
    """The training of a classifier."""

    model: FinetuneModelConfig = FinetuneModelConfig()
    optim: FinetuneOptimConfig = FinetuneOptimConfig()
    start: FinetuneStartConfig = FinetuneStartConfig()
    head: HeadConfig = HeadConfig()
    augment: AugmentConfig = AugmentConfig()
    ema: EMAConfig | None = None
    val: Annotated[ValConfig, MAY_CHANGE]

    @property
    def task(self) -> str:
        parts = {None: "training everything", 0: "a linear probe"}
        trained = parts.get(self.start.trained_blocks, f"training its last {self.start.trained_blocks} blocks")
        return f"{self.head.num_classes or 'all'} classes from {self.start.checkpoint or 'scratch'} ({trained})"

    @property
    def new_run_advice(self) -> str:
        folder = RunFolder(Path(self.runs) / self.name)
        if not folder.model.is_file():
            return super().new_run_advice
        return f"start a new run from this one's model: start.checkpoint={folder.root} and another name="

    @property
    def augmentations(self) -> tuple[Augmentation, ...]:
        """How each sample is augmented."""
        (first,) = super().augmentations
        return (replace(first, rand_augment=self.augment.randaugment),)

    def problems(self) -> Iterator[str]:
        """The problems any training can have, and settings of the classifier's sections that conflict."""
        yield from super().problems()
        start, optim = self.start, self.optim
        if start.checkpoint is None and start.trained_blocks is not None:
            yield f"start.trained_blocks={start.trained_blocks} would freeze random weights: set start.checkpoint"

        if self.head.kind == "batchnorm" and start.trained_blocks != 0:
            yield "head.kind=batchnorm is for linear probes: set start.trained_blocks=0, or head.kind=linear"

        if optim.name == "lars" and start.trained_blocks != 0:
            yield "optim.name=lars is for linear probes: set start.trained_blocks=0, or optim.name=adamw"
        if self.augment.randaugment and self.data.pixels.format != RGB:
            yield f"augment.randaugment={self.augment.randaugment} {self.data.not_rgb}: leave it empty"
        try:
            self.augmentations  # noqa: B018
        except ValueError as error:
            yield f"augment.randaugment: {error}"


def load(recipe: str, overrides: list[str]) -> FinetuneConfig:
    """The configuration of a recipe; see `load_config`."""
    return load_config(FinetuneConfig, recipe, overrides, RECIPES, ELSEWHERE)
