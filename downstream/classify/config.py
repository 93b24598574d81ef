"""What a classifier is trained as: `load` turns a recipe and its overrides into one frozen, checked configuration."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from data.transforms import Augmentation
from pretrain.trainer.config import ModelConfig, OptimConfig, RunConfig, Share
from pretrain.trainer.schema import MAY_CHANGE, Section, load_config

RECIPES = Path(__file__).parent / "recipes"


class FinetuneModelConfig(ModelConfig):
    """The encoder; of others' positions too."""

    position: Literal["relative", "sincos", "bias"] = Field(  # type: ignore[assignment]
        "relative", description="sincos: any absolute table, as MAE's; bias: a table in each block, as BEiT's, SimMIM's"
    )
    drop_path_rate: float = Field(
        0.0, ge=0, lt=1, description="stochastic depth: of the last block, falling linearly to 0 at the first"
    )


class StartConfig(Section):
    """Where the encoder's weights come from."""

    checkpoint: str | None = Field(
        None, description="a run or a file, as of downstream.checkpoints.export, or a classifier; none: from scratch"
    )
    weights: Literal["online", "ema"] | None = Field(None, description="none: what a method's authors evaluate")
    trained_blocks: int | None = Field(
        None, ge=0, description="train the last so many blocks and the head; 0: a linear probe; none: everything"
    )


class HeadConfig(Section):
    """What stands on the encoder."""

    num_classes: int = Field(ge=2)
    kind: Literal["linear", "batchnorm"] = Field(
        "linear", description="batchnorm: features are standardised over the batch first, as in MAE's linear probe"
    )
    pool: Literal["avg", "token"] = Field("avg", description="average of the patches' tokens, or the class token")


class AugmentConfig(Section):
    """timm's augmentations of the training images; crop, flip and colours are keys of `data`."""

    randaugment: str = Field("", description="as timm writes it: rand-m9-mstd0.5-inc1; empty: none")
    random_erasing: Share = Field(0.0, description="probability of replacing a rectangle by noise")
    mixup: float = Field(0.0, ge=0, description="alpha")
    cutmix: float = Field(0.0, ge=0, description="alpha; with mixup, each batch gets one of the two")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the labels")

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


class EMAConfig(Section):
    """An exponential moving average of the weights, evaluated and saved beside them."""

    decay: Share = 0.9999


class FinetuneOptimConfig(OptimConfig):
    """The optimiser and its schedule."""

    name: Literal["adamw", "lars"] = "adamw"
    layer_decay: float = Field(1.0, gt=0, le=1, description="learning rate of a block as a share of the next one's")
    momentum: Share = Field(0.9, description="of lars")


class ValConfig(Section):
    """What is measured while training goes on."""

    shards: str = Field(description="as data.shards, of the validation images")
    every_epochs: int = Field(1, ge=1, description="the end of training is measured as well")
    batch_size: int = Field(128, ge=1, description="images of a batch, on each rank")


class FinetuneConfig(RunConfig):
    """A classifier's training."""

    model: FinetuneModelConfig = FinetuneModelConfig()
    optim: FinetuneOptimConfig = FinetuneOptimConfig()
    start: StartConfig = StartConfig()
    head: HeadConfig
    augment: AugmentConfig = AugmentConfig()
    ema: EMAConfig | None = None
    val: Annotated[ValConfig, MAY_CHANGE]

    @property
    def task(self) -> str:
        parts = {None: "all of it is trained", 0: "a linear probe"}
        trained = parts.get(self.start.trained_blocks, f"its last {self.start.trained_blocks} blocks are trained")
        return f"{self.head.num_classes} classes from {self.start.checkpoint or 'scratch'} ({trained})"

    @property
    def augmentations(self) -> tuple[Augmentation, ...]:
        """What each sample gives."""
        (first,) = super().augmentations
        return (replace(first, rand_augment=self.augment.randaugment),)

    @model_validator(mode="after")
    def _makes_sense(self) -> "FinetuneConfig":
        start, optim = self.start, self.optim
        if start.checkpoint is None and start.trained_blocks is not None:
            raise ValueError(
                f"start.trained_blocks={start.trained_blocks} leaves random weights as they are: set start.checkpoint"
            )
        if self.head.kind == "batchnorm" and start.trained_blocks != 0:
            raise ValueError("head.kind=batchnorm is a linear probe's: set start.trained_blocks=0, or head.kind=linear")
        if optim.name == "lars" and start.trained_blocks != 0:
            raise ValueError("optim.name=lars is a linear probe's: set start.trained_blocks=0, or optim.name=adamw")
        try:
            self.augmentations  # noqa: B018
        except ValueError as error:
            raise ValueError(f"augment.randaugment: {error}") from None
        return self


def load(recipe: str, overrides: list[str]) -> FinetuneConfig:
    """The configuration of a recipe; see `load_config`."""
    return load_config(FinetuneConfig, recipe, overrides, RECIPES)
