"""Everything a run is made of: `load` turns a recipe and its overrides into one frozen, checked `Config`."""

from dataclasses import replace
from typing import Annotated, Any, Generic, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from data.transforms import Picture
from pretrain.methods import METHODS
from pretrain.methods.context import Context
from pretrain.methods.partial import Partial
from pretrain.schema import Section, explain, merge, nearest, parse_overrides, read_recipe

MethodConfig = TypeVar("MethodConfig", bound=Section)
Share = Annotated[float, Field(ge=0, le=1)]


class ModelConfig(Section):
    """The encoder."""

    arch: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"] = "vit_base"
    patch: int = Field(16, ge=1, description="side of a patch in pixels")
    position: Literal["relative", "sincos"] = "relative"
    checkpoint_blocks: bool = Field(False, description="activation checkpointing: recompute blocks in the backward")


class DataConfig(Section):
    """Shards and what is cut out of their images."""

    shards: str = Field(description="a folder of tar shards, one tar, or a brace pattern")
    size: int | tuple[int, int] = Field(224, description="side in pixels, or [height, width]")
    crop: Literal["random", "simple"] = Field(
        "random", description="random: RandomResizedCrop; simple: DeiT III's, the short side resized, then cut to size"
    )
    crop_scale: tuple[Share, Share] = Field((0.2, 1.0), description="area of the random crop")
    flip: Share = Field(0.5, description="probability of a horizontal flip")
    color_jitter: Share = Field(0.0, description="probability of changing brightness, contrast, saturation and hue")
    workers: int = Field(8, ge=0, description="loader processes of each rank")
    max_skipped: int = Field(1000, ge=0, description="images that a rank may fail to decode before the run stops")

    @property
    def height_width(self) -> tuple[int, int]:
        return (self.size, self.size) if isinstance(self.size, int) else self.size


class OptimConfig(Section):
    """AdamW and its schedule: linear warm-up, then cosine to `min_lr`."""

    base_lr: float = Field(1.5e-4, gt=0, description="learning rate for a batch of 256; scaled by batch / 256")
    min_lr: float = Field(0.0, ge=0)
    warmup_epochs: float = Field(40, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[Share, Share] = (0.9, 0.95)
    clip_grad: float = Field(0.0, ge=0, description="largest gradient norm; 0 does not clip")


class TrainConfig(Section):
    """How long, how many at once, on which engine."""

    epochs: int = Field(400, ge=1)
    batch: int = Field(4096, ge=1, description="images of one optimiser step, over all ranks and accumulation")
    accumulation: int = Field(1, ge=1, description="micro-batches of one optimiser step")
    precision: Literal["bf16", "fp32"] = "bf16"
    ds_config: str = Field("ds_configs/zero1.json", description="engine keys of DeepSpeed")
    max_nonfinite: int = Field(10, ge=1, description="steps in a row with a non-finite gradient before the run stops")


class CheckpointConfig(Section):
    """In optimiser steps; a signal and the end of training save as well."""

    every: int = Field(1000, ge=1)
    keep_last: int = Field(2, ge=1)
    keep_every: int = Field(0, ge=0, description="never delete checkpoints of these steps; 0 has no such keepers")


class LogConfig(Section):
    """In optimiser steps."""

    every: int = Field(20, ge=1)
    panel_images: int = Field(8, ge=1, description="rows of reconstructions.png")


class ProbeConfig(Section):
    """k-NN and ridge regression on frozen features while the run goes on; changes nothing of the training."""

    train: str = Field(description="labelled shards or class folders, where neighbours are looked for")
    val: str = Field(description="labelled shards or class folders, that are asked for")
    every: int = Field(ge=1, description="in epochs; the end of training is measured as well")
    k: int = Field(20, ge=1, description="neighbours that vote")


class RunConfig(Section):
    """What every training is made of. `name` is its folder under `runs`."""

    name: str = Field(coerce_numbers_to_str=True, pattern=r"^[\w-][\w.-]*$")
    runs: str = "runs"
    seed: int = Field(0, ge=0)
    model: ModelConfig = ModelConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def task(self) -> str:
        """What is trained, in a few words."""
        raise NotImplementedError

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image's patches."""
        height, width = self.data.height_width
        return height // self.model.patch, width // self.model.patch

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """What each sample gives."""
        data = self.data
        return (Picture(data.crop, data.crop_scale, data.flip, data.color_jitter),)

    @property
    def peak_lr(self) -> float:
        """base_lr * batch / 256: the linear scaling rule."""
        return self.optim.base_lr * self.train.batch / 256

    @model_validator(mode="after")
    def _sizes_fit(self) -> "RunConfig":
        patch = self.model.patch
        for side in self.data.height_width:
            if side < patch or side % patch:
                near = max(side // patch, 1) * patch
                raise ValueError(
                    f"data.size={self.data.size}: {side} pixels are no multiple of model.patch={patch}; "
                    f"the nearest are {near} and {near + patch}"
                )
        if self.optim.warmup_epochs >= self.train.epochs:
            raise ValueError(
                f"optim.warmup_epochs={self.optim.warmup_epochs:g} leaves nothing of train.epochs={self.train.epochs}: "
                f"set it lower"
            )
        if not 0 < self.data.crop_scale[0] <= self.data.crop_scale[1]:
            raise ValueError(f"data.crop_scale={list(self.data.crop_scale)}: two shares above 0, the smaller first")
        return self

    def to_yaml(self) -> str:
        """The resolved recipe; `load` reads it back to an equal configuration."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def trained_function(self) -> dict[str, Any]:
        """The keys on which the weights depend: a checkpoint continues only where they are equal."""
        return self.model_dump(
            mode="json",
            include={
                "seed": True,
                "model": {"arch", "patch", "position"},
                "data": {"size", "crop", "crop_scale", "flip", "color_jitter"},
                "optim": True,
                "train": {"epochs", "batch", "precision"},
            },
        )


class Config(RunConfig, Generic[MethodConfig]):
    """A pretraining run."""

    method: MethodConfig
    partial: Partial | None = None
    context: Context | None = None
    probe: ProbeConfig | None = None

    @property
    def task(self) -> str:
        name: str = self.method.name  # type: ignore[attr-defined]
        return name

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """What each sample gives: one picture, or the two of LUT."""
        (first,), context = super().pictures, self.context
        if context is None:
            return (first,)
        return first, replace(first, color_jitter=context.color_jitter, three_augment=context.three_augment)

    @model_validator(mode="after")
    def _fits_together(self) -> "Config[MethodConfig]":
        method: Any = self.method
        method.check(self.grid, self.model)
        if self.partial:
            check_addon("partial", method.name)
            if getattr(method, "decoder", "transformer") != "transformer":
                raise ValueError(
                    f"partial throws tokens of a transformer; method.decoder={method.decoder} has none: leave it out"
                )
            self.partial.num_kept(*method.count(self.grid, self.model))
        if self.context:
            check_addon("context", method.name)
            if getattr(method, "mask", "random") != "random":
                raise ValueError(f"context draws two disjoint random masks: set method.mask=random, not {method.mask}")
            patches, masked = method.count(self.grid, self.model)
            self.context.check(patches, masked, self.train.batch // self.train.accumulation)
        return self

    def trained_function(self) -> dict[str, Any]:
        """The keys on which the weights depend; tokenizer and components are named by their sha256."""
        own = self.model_dump(
            mode="json",
            include={"method", "partial", "context"},
            exclude={"method": {"tokenizer": {"weights"}, "pca": {"file"}}},
        )
        return own | super().trained_function()


def check_addon(addon: str, method: str) -> None:
    """Raises ValueError where an add-on is not defined for a method."""
    if addon not in METHODS[method].addons:
        defined = [name for name in METHODS if addon in METHODS[name].addons]
        raise ValueError(f"{addon} is defined for {', '.join(defined)}, not for {method}: leave it out")


def load(recipe: str, overrides: list[str]) -> Config[Any]:
    """The configuration of a recipe (a path, or the name of a shipped one) under `section.key=value` overrides.

    Raises:
        ValueError: an unknown recipe, key or name, a wrong type, or values that do not fit together; the message
            names the key to change.
    """
    raw = merge(read_recipe(recipe), parse_overrides(overrides))
    method = raw.get("method") or {}
    name = method.get("name") if isinstance(method, dict) else method
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"unknown method.name={name!r}: {nearest(str(name), list(METHODS))}")
    schema: type[Config[Any]] = Config.__class_getitem__(METHODS[name].Config)  # type: ignore[assignment]
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise ValueError(explain(error, schema)) from None
