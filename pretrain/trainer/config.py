"""The sections of every training's configuration; pretraining and fine-tuning add their own."""

from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import yaml
from pydantic import Field, model_validator

from data.transforms import Augmentation
from pretrain.trainer.data_config import DataConfig
from pretrain.trainer.schema import MAY_CHANGE, Section, Share

AUTO = "auto"  # `train.ds_config`: chosen when the run starts


class ModelConfig(Section):
    """The encoder."""

    arch: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"] = Field(
        "vit_base", description="width and depth: 5.7, 22, 86, 304 or 632 million parameters"
    )
    patch_size: int = Field(16, ge=1, description="side of a patch in pixels")
    position: Literal["relative", "sincos"] = Field(
        "relative", description="LoMaR's contextual relative position, or fixed sin-cos positions like MAE's"
    )
    registers: int = Field(
        0, ge=0, description="tokens after the class token that belong to no patch: 4 in DINOv2, 3 or 7 in Pixio"
    )
    drop_path_rate: float = Field(
        0.0, ge=0, lt=1, description="stochastic depth of the last block, decreasing linearly to 0 at the first"
    )
    grad_checkpointing: Annotated[bool, MAY_CHANGE] = Field(
        False, description="recompute each block in the backward pass: less memory, a third more compute"
    )


class OptimConfig(Section):
    """AdamW and its schedule: linear warm-up, then a cosine to `min_lr`, or steps."""

    base_lr: float = Field(
        1.5e-4, gt=0, description="learning rate for a batch of lr_batch_size; scaled with the batch"
    )
    lr_batch_size: int = Field(256, ge=1, description="the batch that base_lr is for: 512 in SimMIM's code")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the cosine; lower limit of the steps")
    warmup_epochs: float = Field(40, ge=0, description="epochs over which the learning rate rises from 0")
    schedule: Literal["cosine", "steps"] = Field("cosine", description="how the learning rate falls after the warm-up")
    step_epochs: tuple[float, ...] = Field((), description="for schedule=steps: epochs after which the rate falls")
    step_factor: Share = Field(0.1, description="for schedule=steps: factor by which it falls each time")
    weight_decay: float = Field(0.05, ge=0, description="for matrices, tokens and relative tables, not for vectors")
    betas: tuple[Share, Share] = Field((0.9, 0.95), description="AdamW's decay of first and second moments")
    clip_grad: float = Field(0.0, ge=0, description="maximum gradient norm; 0: no clipping")


class TrainConfig(Section):
    """Length of the training, batch size, precision and engine."""

    epochs: int = Field(400, ge=1, description="how many times each training image is shown")
    global_batch_size: int = Field(
        4096, ge=1, description="images per optimizer step, over all ranks and micro-batches"
    )
    gradient_accumulation_steps: Annotated[int, MAY_CHANGE] = Field(
        1, ge=1, description="micro-batches per optimizer step"
    )
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="bf16: autocast; parameters, norms, losses and sums of gradients stay fp32"
    )
    deterministic: Annotated[bool, MAY_CHANGE] = Field(
        True, description="attention on a GPU always gives the same bits, as an exact resume needs; false: the fastest"
    )
    ds_config: Annotated[str, MAY_CHANGE] = Field(
        AUTO,
        description="DeepSpeed's engine keys: a name in ds_configs/, or a JSON file; auto: the ZeRO stage of the "
        "run's newest checkpoint; zero0 for a new run",
    )
    max_nonfinite_steps: Annotated[int, MAY_CHANGE] = Field(
        10, ge=1, description="consecutive steps with a non-finite gradient before the run stops"
    )


class CheckpointConfig(Section):
    """When to save; a signal and the end of training save as well."""

    every_steps: int = Field(1000, ge=1, description="optimizer steps between checkpoints")
    keep_last: int = Field(2, ge=1, description="how many of the newest checkpoints are kept")
    keep_every_steps: int = Field(0, ge=0, description="never delete checkpoints at multiples of this; 0: none")
    max_gb: float = Field(
        0,
        ge=0,
        description="limit for all checkpoints in GB (1e9 bytes): the oldest are deleted first, those multiples too; "
        "0: no limit",
    )
    exact_resume: bool = Field(
        True, description="refuse to resume if compile, attention or residual differ; false: warn and continue"
    )


class StartConfig(Section):
    """The weights that a new run starts from; a run with a checkpoint of its own continues from that."""

    checkpoint: str | None = Field(
        None, description="a run or a file that downstream.checkpoints.export reads; none: from scratch"
    )
    weights: str | None = Field(
        None,
        description="online, ema, or the name of one of the file's encoders; none: what the method's authors evaluate",
    )


class WatchdogConfig(Section):
    """Minutes that anything may take before the run ends with exit code 75 and reports where it was; 0: no limit."""

    start_minutes: float = Field(60, ge=0, description="each phase of the start: the index, joining, loading")
    first_step_minutes: float = Field(60, ge=0, description="the first step, which includes compiling")
    step_minutes: float = Field(10, ge=0, description="a step, including loading its images")
    checkpoint_minutes: float = Field(30, ge=0, description="saving a checkpoint")
    evaluation_minutes: float = Field(120, ge=0, description="an evaluation or probe, and the files at the end")
    silent_minutes: float = Field(2, ge=0, description="silence after which a rank counts as lost")
    slow_factor: float = Field(
        2, ge=0, description="refuse at the start nodes that take more than this many times the median; 0: refuse none"
    )

    def problems(self) -> Iterator[str]:
        """Limits that a healthy run would exceed: one sentence each."""
        if 0 < self.silent_minutes < 0.2:
            yield (
                f"watchdog.silent_minutes={self.silent_minutes:g}: ranks give a sign of life every five seconds; "
                "set at least 0.2, or 0 for no limit"
            )
        if 0 < self.slow_factor < 1.1:
            yield (
                f"watchdog.slow_factor={self.slow_factor:g}: every node takes about 1 times the median; "
                "set at least 1.1, or 0 to refuse none"
            )


class LogConfig(Section):
    """What is logged."""

    every_steps: int = Field(20, ge=1, description="optimizer steps between lines of metrics.jsonl")
    samples: bool = Field(False, description="true: samples.jsonl lists the images of each step, to compare runs")


class RunConfig(Section):
    """The configuration of any training. Its files go to `runs`/`name`."""

    name: Annotated[str, MAY_CHANGE] = Field(
        pattern=r"^[\w-][\w.-]*$",
        description="a folder name of letters, digits, '_', '-' and '.', not starting with '.'",
    )
    runs: Annotated[str, MAY_CHANGE] = Field("runs", description="folder of all runs; a run's files go to runs/name")
    seed: int = Field(0, ge=0, description="for the initial weights, the order of samples, crops, masks and drop path")
    model: ModelConfig = ModelConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: Annotated[CheckpointConfig, MAY_CHANGE] = CheckpointConfig()
    log: Annotated[LogConfig, MAY_CHANGE] = LogConfig()
    watchdog: Annotated[WatchdogConfig, MAY_CHANGE] = WatchdogConfig()

    @property
    def task(self) -> str:
        """What is trained, in a few words for the log."""
        raise NotImplementedError

    @property
    def new_run_advice(self) -> str:
        """What to do if the run cannot continue as it is configured now: how a new one starts where it ended."""
        return "start a new run with another name="

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image's patches."""
        height, width = self.data.height_width
        return height // self.model.patch_size, width // self.model.patch_size

    @property
    def augmentations(self) -> tuple[Augmentation, ...]:
        """How each view of a sample is augmented."""
        data = self.data
        return (Augmentation(data.crop, data.crop_scale, data.hflip, data.color_jitter),)

    @property
    def peak_lr(self) -> float:
        """base_lr * batch / lr_batch_size: the linear scaling rule."""
        return self.optim.base_lr * self.train.global_batch_size / self.optim.lr_batch_size

    def memory_advice(self, ranks: int) -> str:
        """What to do if a GPU's memory is full: the keys to change."""
        accumulation = self.train.gradient_accumulation_steps
        micro_batch = self.train.global_batch_size // (ranks * accumulation)
        advice = []
        if micro_batch > 1:
            higher = f"train.gradient_accumulation_steps higher than {accumulation}"
            advice += [f"{higher} (the micro-batch is {micro_batch})"]
        if not self.model.grad_checkpointing:
            advice += ["model.grad_checkpointing=true"]
        settings = f"set {', '.join(advice)}, or " if advice else ""
        return f"{settings}continue with a higher ZeRO stage (train.ds_config)"

    def problems(self) -> Iterator[str]:
        """Values that do not fit together: one sentence each, with the key to change."""
        yield from self.data.problems()
        if "://" in self.runs:  # not repeated: it may have a password in it
            yield "runs is a URL: give a folder, as runs are written to a file system"
        patch = self.model.patch_size
        for side in self.data.height_width:
            if side < patch or side % patch:
                near = max(side // patch, 1) * patch
                yield (
                    f"data.image_size={self.data.image_size}: {side} is not a multiple of "
                    f"model.patch_size={patch}; the nearest multiples are {near} and {near + patch}"
                )
        if self.optim.warmup_epochs >= self.train.epochs:
            yield f"optim.warmup_epochs={self.optim.warmup_epochs:g} must be less than train.epochs={self.train.epochs}"
        yield from self._problems_of_steps()
        yield from self.watchdog.problems()
        epochs, repeats = self.train.epochs, self.data.repeats
        if epochs % repeats:
            near = max(epochs // repeats, 1) * repeats
            yield (
                f"train.epochs={epochs} is not a multiple of data.repeats={repeats}, so the last pass over the images "
                f"would leave some out: set train.epochs={near} or {near + repeats}"
            )
        if not 0 < self.data.crop_scale[0] <= self.data.crop_scale[1]:
            yield f"data.crop_scale={list(self.data.crop_scale)}: must be two shares above 0, the smaller first"

    def _problems_of_steps(self) -> Iterator[str]:
        optim, epochs = self.optim, self.train.epochs
        if optim.schedule != "steps":
            return
        given = f"optim.step_epochs={[float(f'{epoch:g}') for epoch in optim.step_epochs]}"
        if not optim.step_epochs:
            yield f"optim.schedule=steps: set optim.step_epochs, for example to [{epochs * 7 // 8}]"
        elif list(optim.step_epochs) != sorted(optim.step_epochs) or optim.step_epochs[0] < optim.warmup_epochs:
            yield f"{given}: the epochs must increase, from optim.warmup_epochs={optim.warmup_epochs:g} or later"
        elif optim.step_epochs[-1] >= epochs:
            yield f"{given} must be less than train.epochs={epochs}: set optim.step_epochs=[{epochs * 7 // 8}]"

    @model_validator(mode="after")
    def _fits_together(self) -> "RunConfig":
        if found := "\n".join(dict.fromkeys(self.problems())):
            raise ValueError(found)
        return self

    def to_yaml(self) -> str:
        """The resolved recipe; reading it back gives an equal configuration."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def problem_of(check: Callable[..., object], *arguments: object) -> Iterator[str]:
    """The message of the ValueError that a check raises, if it does."""
    try:
        check(*arguments)
    except ValueError as error:
        yield str(error)
