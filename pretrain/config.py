"""The configuration of a pretraining run: `load` turns a recipe and its overrides into one frozen, checked object."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Union

from pydantic import Field, create_model, model_validator

from data.pixel_format import RGB
from data.transforms import Augmentation
from pretrain.methods import METHODS, AnyMethodConfig, import_methods
from pretrain.methods.lut import LUTConfig
from pretrain.methods.pr_mim import PRMIMConfig
from pretrain.methods.targets import AnyTargetConfig, PixelsConfig
from pretrain.methods.targets.features import EMAConfig
from pretrain.models.features import check_blocks
from pretrain.models.vit import ARCHS
from pretrain.sections import (
    PretrainLogConfig,
    PretrainModelConfig,
    PretrainOptimConfig,
    PretrainStartConfig,
    ProbeConfig,
)
from pretrain.size_schedule import PretrainDataConfig, Size, size_text
from pretrain.trainer.config import RunConfig, problem_of
from pretrain.trainer.recipe import load_config, parse_overrides
from pretrain.trainer.schema import MAY_CHANGE

RECIPES = Path(__file__).parent / "recipes"
ELSEWHERE = {"downstream/classify/finetune.py": Path(__file__).parents[1] / "downstream" / "classify" / "recipes"}


class PretrainConfig(RunConfig):
    """A pretraining run.

    Attributes:
        imported: the `method.module` that was given on the command line and imported.
        own_methods: the names of the methods that it defines.
    """

    imported: ClassVar[str | None] = None
    own_methods: ClassVar[frozenset[str]] = frozenset()
    follows: ClassVar[dict[str, str]] = {"target": "method"}
    hints: ClassVar[dict[str, str]] = {"method.name": "; a method of your own needs method.module=FILE as well"}

    model: PretrainModelConfig = PretrainModelConfig()
    data: PretrainDataConfig
    method: AnyMethodConfig
    target: AnyTargetConfig
    optim: PretrainOptimConfig = PretrainOptimConfig()
    log: Annotated[PretrainLogConfig, MAY_CHANGE] = PretrainLogConfig()
    pr_mim: PRMIMConfig | None = None
    lut: LUTConfig | None = None
    start: PretrainStartConfig | None = None
    probe: Annotated[ProbeConfig | None, MAY_CHANGE] = None

    @property
    def task(self) -> str:
        return f"{self.method.name} (target: {self.target.name})"

    @property
    def new_run_advice(self) -> str:
        this = Path(self.runs) / self.name
        return f"start a new run from the weights of this one: start.run={this} and another name="

    @property
    def augmentations(self) -> tuple[Augmentation, ...]:
        """How each view of a sample is augmented: one view, or LUT's two."""
        (first,), lut = super().augmentations, self.lut
        if lut is None:
            return (first,)
        return first, replace(first, color_jitter=lut.color_jitter, three_augment=lut.three_augment)

    @property
    def earlier(self) -> list[tuple[int, "PretrainConfig"]]:
        """The earlier sizes of `data.size_schedule`, in order: the epoch where each ends, and its configuration."""
        sizes = self.data.sizes
        return [(epoch, self.at_size(size)) for (_, size), (epoch, _) in pairwise(sizes)]

    def at_size(self, size: Size) -> "PretrainConfig":
        """The same configuration with images of one other size throughout; unchecked, see `problems`."""
        data = self.data.model_copy(update={"image_size": size, "size_schedule": None})
        at = self.model_copy(update={"data": data})
        return at.model_copy(update={"method": self.method.on_grid(at.grid, self.grid)})

    @model_validator(mode="before")
    @classmethod
    def _complete_target(cls, raw: object) -> object:
        """Completes `target` with the method's default; expands `method: mae` and `target: tokens` to sections."""
        if not isinstance(raw, dict):
            return raw
        raw = dict(raw)
        for section in ("method", "target"):
            if isinstance(raw.get(section), str):
                raw[section] = {"name": raw[section]}
        method, target = raw.get("method"), raw.get("target") or {}
        name = method.get("name") if isinstance(method, Mapping) else None
        if isinstance(method, Mapping):
            cls._check_module(method.get("module"), name)
        if not isinstance(name, str) or name not in METHODS:
            return raw | {"target": PixelsConfig()}  # only the method is reported: what it may predict is unknown
        if isinstance(target, Mapping):
            default = METHODS[name].default_target
            if target.get("name", default.name) == default.name:
                target = {"name": default.name, **default.model_dump(exclude_unset=True), **target}
        return raw | {"target": target}

    @classmethod
    def _check_module(cls, module: object, name: object) -> None:
        """Ensures that no recipe, and no configuration in a run's folder, makes a command run code."""
        if module != cls.imported:
            raise ValueError(
                f"method.module={module} is set only in the recipe, and using it runs its code: if you trust it, "
                f"also give method.module={module} on the command line"
            )
        if module is not None and name not in cls.own_methods:
            raise ValueError(
                f"method.module={module} defines {', '.join(sorted(cls.own_methods))}, not {name}: "
                f"give method.name={min(cls.own_methods)}"
            )

    def problems(self) -> Iterator[str]:
        """Problems of every training, and what the method, target, add-ons and size schedule do not accept."""
        own = list(super().problems())
        has_grid = not any(problem.startswith("data.image_size") for problem in own)
        if self.probe:
            own += problem_of(_check_probe, self.probe.block, ARCHS[self.model.arch].depth)
        own += self._problems_on_grid() if has_grid else ()
        yield from own
        if self.data.size_schedule and has_grid:
            yield from self._problems_of_schedule({*own})

    def _problems_of_schedule(self, own: set[str]) -> Iterator[str]:
        """Problems of `data.size_schedule` and of its sizes, except those that exist at any size."""
        schedule, position = f"data.size_schedule={self.data.size_schedule}", self.model.position
        if problem := self.data.schedule_problem(self.train.epochs):
            yield problem
        elif position in ("learned", "bias") and self.earlier:
            yield (
                f"model.position={position} has parameters for one grid of patches, but {schedule} has several: set "
                f"model.position=sincos or relative, or leave the schedule out"
            )
        else:
            for size in dict.fromkeys(size for _, size in self.data.sizes):
                new = (problem for problem in self.at_size(size).problems() if problem not in own)
                if problem := next(new, ""):
                    problem = problem.partition(f"data.image_size={size}: ")[2] or problem
                    fits = " and ".join(size_text(near) for near in self._nearest_sizes(size, own))
                    yield f"{schedule} has {size_text(size)}: {problem}; nearest sizes that fit: {fits or 'none'}"

    def _nearest_sizes(self, size: Size, own: set[str]) -> list[Size]:
        """The next smaller and the next larger size of the same shape that cause no further problems."""
        patch, (height, width) = self.model.patch_size, size
        heights = range(patch, 2 * max(height, *self.data.height_width), patch)
        shaped = [(side, max(round(side * width / height / patch), 1) * patch) for side in heights]
        fits = [near for near in shaped if {*self.at_size(near).problems()} <= own]
        smaller, larger = ([near for near in fits if (near[0] < height) == below] for below in (True, False))
        return [*smaller[-1:], *larger[:1]]

    def _problems_on_grid(self) -> Iterator[str]:
        """What the method, target and add-ons do not accept."""
        method, kind = self.method, METHODS[self.method.name]
        unfit = [*problem_of(method.check, self.grid, self.model)]
        yield from unfit
        if self.target.name not in kind.targets:
            yield (
                f"method {method.name} predicts {' or '.join(sorted(kind.targets))}, not target.name={self.target.name}"
            )
        both_unfit = [*problem_of(method.check_target, self.target, self.model.patch_size)]
        yield from both_unfit or problem_of(self.target.check, self.grid, self.model)
        if not [*self.data.problems()]:
            yield from problem_of(self.target.check_pixels, self.data.pixels)
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
            for key in ("color_jitter", "three_augment"):
                if getattr(self.lut, key) and self.data.pixels.format != RGB:
                    off = "false" if key == "three_augment" else "0"
                    yield f"lut.{key}={getattr(self.lut, key)} {self.data.not_rgb}: set lut.{key}={off}"
            yield from problem_of(check_add_on, "lut", method.name)
            yield from problem_of(method.check_lut)
            micro_batch = self.train.global_batch_size // self.train.gradient_accumulation_steps
            yield from problem_of(self.lut.check, patches, masked, micro_batch)
            if self.lut.loss == "infonce" and self.data.repeats > 1:
                yield (
                    f"lut.loss=infonce tells images of a micro-batch apart, but data.repeats={self.data.repeats} puts "
                    f"the same image there several times: set data.repeats=1, or another lut.loss"
                )
            if isinstance(self.target, EMAConfig):
                yield "lut and target.name=ema both learn from a moving average of the encoder: leave one of them out"


def _check_probe(blocks: tuple[int, ...], depth: int) -> None:
    try:
        check_blocks(blocks, depth)
    except ValueError as error:
        raise ValueError(f"probe.block: {error}") from None


def check_add_on(add_on: str, method: str) -> None:
    """Raises ValueError if an add-on is not defined for a method."""
    if add_on not in METHODS[method].add_ons:
        defined = [name for name in METHODS if add_on in METHODS[name].add_ons]
        raise ValueError(f"{add_on} works with {', '.join(defined)}, not with {method}: leave it out")


def load(recipe: str, overrides: list[str]) -> PretrainConfig:
    """The configuration of a recipe; see `load_config`. A `method.module` among the overrides is imported.

    Raises:
        ValueError: as `load_config` and `import_methods`.
    """
    method = parse_overrides(overrides, PretrainConfig).get("method")
    module = method.get("module") if isinstance(method, dict) else None
    schema = PretrainConfig if module is None else _schema_with(str(module))
    return load_config(schema, recipe, overrides, RECIPES, ELSEWHERE)


def _schema_with(module: str) -> type[PretrainConfig]:
    """`PretrainConfig` whose `method` may also be one that a module outside this project defines."""
    own_methods = import_methods(module)
    configs: Any = Union[tuple(kind.Config for kind in METHODS.values())]  # noqa: UP007 - as many as there are
    method: Any = Annotated[configs, Field(discriminator="name")]
    schema = create_model("PretrainConfig", __base__=PretrainConfig, method=(method, ...))
    schema.imported, schema.own_methods = module, own_methods
    return schema
