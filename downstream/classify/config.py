"""What a classifier is trained as: `load` turns a recipe and its overrides into one frozen, checked configuration."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from data.transforms import Picture
from pretrain.config import ModelConfig, OptimConfig, RunConfig, Share
from pretrain.schema import Section, explain, merge, parse_overrides, read_recipe

RECIPES = Path(__file__).parent / "recipes"


class FinetuneModelConfig(ModelConfig):
    """The encoder; of others' positions too."""

    position: Literal["relative", "sincos", "bias"] = Field(  # type: ignore[assignment]
        "relative", description="sincos: any absolute table, as MAE's; bias: a table in each block, as BEiT's, SimMIM's"
    )


class StartConfig(Section):
    """Where the encoder's weights come from."""

    checkpoint: str | None = Field(
        None, description="a run or a file, as of downstream.export, or a classifier; none: from scratch"
    )
    weights: Literal["online", "ema"] | None = Field(None, description="none: what a method's authors evaluate")
    trained_blocks: int | None = Field(
        None, ge=0, description="train the last so many blocks and the head; 0: a linear probe; none: everything"
    )


class HeadConfig(Section):
    """What stands on the encoder."""

    classes: int = Field(ge=2)
    kind: Literal["linear", "batchnorm"] = Field(
        "linear", description="batchnorm: features are standardised over the batch first, as in MAE's linear probe"
    )
    pool: Literal["avg", "token"] = Field("avg", description="average of the patches' tokens, or the class token")
    drop_path: float = Field(0.0, ge=0, lt=1, description="probability of leaving out the last block, falling to 0")


class AugmentConfig(Section):
    """timm's augmentations of the training images; crop, flip and colours are keys of `data`."""

    randaugment: str = Field("", description="as timm writes it: rand-m9-mstd0.5-inc1; empty: none")
    erasing: Share = Field(0.0, description="probability of replacing a rectangle by noise")
    mixup: float = Field(0.0, ge=0, description="alpha")
    cutmix: float = Field(0.0, ge=0, description="alpha; with mixup, each batch gets one of the two")
    smoothing: float = Field(0.0, ge=0, lt=1, description="of the labels")

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


class AverageConfig(Section):
    """An exponential moving average of the weights, evaluated and saved beside them."""

    momentum: Share = 0.9999


class FinetuneOptimConfig(OptimConfig):
    """The optimiser and its schedule."""

    name: Literal["adamw", "lars"] = "adamw"
    layer_decay: float = Field(1.0, gt=0, le=1, description="learning rate of a block as a share of the next one's")
    momentum: Share = Field(0.9, description="of lars")


class ValConfig(Section):
    """What is measured while training goes on."""

    shards: str = Field(description="as data.shards, of the validation images")
    every: int = Field(1, ge=1, description="in epochs; the end of training is measured as well")
    batch: int = Field(128, ge=1, description="images at once, on each rank")


class FinetuneConfig(RunConfig):
    """A classifier's training."""

    model: FinetuneModelConfig = FinetuneModelConfig()
    optim: FinetuneOptimConfig = FinetuneOptimConfig()
    start: StartConfig = StartConfig()
    head: HeadConfig
    augment: AugmentConfig = AugmentConfig()
    average: AverageConfig | None = None
    val: ValConfig

    @property
    def task(self) -> str:
        parts = {None: "all of it is trained", 0: "a linear probe"}
        trained = parts.get(self.start.trained_blocks, f"its last {self.start.trained_blocks} blocks are trained")
        return f"{self.head.classes} classes from {self.start.checkpoint or 'scratch'} ({trained})"

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """What each sample gives."""
        (first,) = super().pictures
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
            self.pictures  # noqa: B018
        except ValueError as error:
            raise ValueError(f"augment.randaugment: {error}") from None
        return self

    def trained_function(self) -> dict[str, Any]:
        """The keys on which the weights depend."""
        own = self.model_dump(mode="json", include={"start", "head", "augment", "average"})
        return own | super().trained_function()


def load(recipe: str, overrides: list[str]) -> FinetuneConfig:
    """The configuration of a recipe (a path, or the name of a shipped one) under `section.key=value` overrides.

    Raises:
        ValueError: as of `pretrain.config.load`.
    """
    raw = merge(read_recipe(recipe, RECIPES), parse_overrides(overrides))
    try:
        return FinetuneConfig.model_validate(raw)
    except ValidationError as error:
        raise ValueError(explain(error, FinetuneConfig)) from None
