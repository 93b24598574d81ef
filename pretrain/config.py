"""The configuration of a pretraining run: `load` turns a recipe and its overrides into one frozen, checked object."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from data.transforms import Augmentation
from pretrain.methods import METHODS, AnyMethodConfig
from pretrain.methods.lut import LUTConfig
from pretrain.methods.pr_mim import PRMIMConfig
from pretrain.methods.targets import AnyTargetConfig, PixelsConfig
from pretrain.trainer.config import ModelConfig, RunConfig, problem_of
from pretrain.trainer.recipe import load_config
from pretrain.trainer.schema import MAY_CHANGE, Section

RECIPES = Path(__file__).parent / "recipes"
ELSEWHERE = {"downstream/classify/finetune.py": Path(__file__).parents[1] / "downstream" / "classify" / "recipes"}


class PretrainModelConfig(ModelConfig):
    """The encoder, and how it is computed; `numerics.py` resolves the latter."""

    compile: Annotated[Literal["auto", "on", "off"], MAY_CHANGE] = Field(
        "auto", description="torch.compile of the blocks and both ends of the network; auto: on a GPU, not in ZeRO 3"
    )
    attention: Annotated[Literal["auto", "triton", "sdpa"], MAY_CHANGE] = Field(
        "auto", description="attention in windows; triton: a kernel of our own, auto: on a GPU where it serves"
    )
    residual: Annotated[Literal["fp32", "bf16"], MAY_CHANGE] = Field(
        "fp32", description="precision of the encoder's residual stream; bf16: less memory and time, less exact sums"
    )


class ProbeConfig(Section):
    """k-NN and ridge regression on frozen features during the run; training is the same with and without it."""

    train: str = Field(description="labeled shards or class folders, among which neighbors are searched")
    val: str = Field(description="labeled shards or class folders to classify")
    every_epochs: int = Field(ge=1, description="epochs between measurements; the end of training is measured as well")
    k: int = Field(20, ge=1, description="neighbors that vote")


class PretrainConfig(RunConfig):
    """A pretraining run."""

    follows: ClassVar[dict[str, str]] = {"target": "method"}

    model: PretrainModelConfig = PretrainModelConfig()
    method: AnyMethodConfig
    target: AnyTargetConfig
    pr_mim: PRMIMConfig | None = None
    lut: LUTConfig | None = None
    probe: Annotated[ProbeConfig | None, MAY_CHANGE] = None

    @property
    def task(self) -> str:
        return f"{self.method.name} (target: {self.target.name})"

    @property
    def augmentations(self) -> tuple[Augmentation, ...]:
        """How each view of a sample is augmented: one view, or LUT's two."""
        (first,), lut = super().augmentations, self.lut
        if lut is None:
            return (first,)
        return first, replace(first, color_jitter=lut.color_jitter, three_augment=lut.three_augment)

    @model_validator(mode="before")
    @classmethod
    def _complete_target(cls, raw: object) -> object:
        """Completes `target` with the method's default; `method: mae` and `target: tokens` are sections of a name."""
        if not isinstance(raw, dict):
            return raw
        raw = dict(raw)
        for section in ("method", "target"):
            if isinstance(raw.get(section), str):
                raw[section] = {"name": raw[section]}
        method, target = raw.get("method"), raw.get("target") or {}
        name = method.get("name") if isinstance(method, Mapping) else None
        if not isinstance(name, str) or name not in METHODS:
            return raw | {"target": PixelsConfig()}  # only the method is reported: what it may predict is unknown
        if isinstance(target, Mapping):
            default = METHODS[name].default_target
            if target.get("name", default.name) == default.name:
                target = {"name": default.name, **default.model_dump(exclude_unset=True), **target}
        return raw | {"target": target}

    def problems(self) -> Iterator[str]:
        """As of every training, and what method, target and add-ons do not take."""
        sizes = list(super().problems())
        yield from sizes
        if any(problem.startswith("data.image_size") for problem in sizes):
            return  # there is no grid of patches
        method, kind = self.method, METHODS[self.method.name]
        unfit = [*problem_of(method.check, self.grid, self.model)]
        yield from unfit
        if self.target.name not in kind.targets:
            yield (
                f"method {method.name} predicts {' or '.join(sorted(kind.targets))}, not target.name={self.target.name}"
            )
        yield from problem_of(self.target.check, self.model.patch_size)
        if not unfit:
            yield from self._problems_of_add_ons()

    def _problems_of_add_ons(self) -> Iterator[str]:
        method = self.method
        patches, masked = method.count_patches(self.grid, self.model.patch_size)
        if self.pr_mim:
            yield from problem_of(check_add_on, "pr_mim", method.name)
            yield from problem_of(method.check_pr_mim)
            yield from problem_of(self.pr_mim.num_kept, patches, masked)
        if self.lut:
            yield from problem_of(check_add_on, "lut", method.name)
            yield from problem_of(method.check_lut)
            micro_batch = self.train.global_batch_size // self.train.gradient_accumulation_steps
            yield from problem_of(self.lut.check, patches, masked, micro_batch)


def check_add_on(add_on: str, method: str) -> None:
    """Raises ValueError if an add-on is not defined for a method."""
    if add_on not in METHODS[method].add_ons:
        defined = [name for name in METHODS if add_on in METHODS[name].add_ons]
        raise ValueError(f"{add_on} is defined for {', '.join(defined)}, not for {method}: leave it out")


def load(recipe: str, overrides: list[str]) -> PretrainConfig:
    """The configuration of a recipe; see `load_config`."""
    return load_config(PretrainConfig, recipe, overrides, RECIPES, ELSEWHERE)
