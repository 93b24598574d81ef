"""The plan of a recipe on a cluster: the parts of a step, the run's hours, memory by ZeRO stage, and what limits it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from data.order import check_divisible, steps_per_epoch
from pretrain.config import PretrainConfig
from pretrain.numerics import check_settings, unserved_by_window_kernel, wants_cuda_graphs
from pretrain.plan.block_cost import Numerics
from pretrain.plan.communication import Communication
from pretrain.plan.hardware import Cluster
from pretrain.plan.loader_cost import IMAGENET, Photographs, core_seconds, index_bytes
from pretrain.plan.memory import GIB, Memory, Zero, largest_micro_batch, step_memory
from pretrain.plan.step_time import Step, image_flops, peak, step_time
from pretrain.plan.trace import Trace
from pretrain.trainer.engine import choose_ds_config
from pretrain.trainer.engine_file import read_ds_config


@dataclass(frozen=True)
class StageMemory:
    """A ZeRO stage: memory at the recipe's micro-batch and the largest micro-batch, without and with checkpointing."""

    zero: Zero
    memory: Memory
    largest: int
    checkpointed: Memory
    largest_checkpointed: int


@dataclass(frozen=True)
class NodeNeeds:
    """What a node must provide besides GPUs.

    Attributes:
        loader_cores: cores that decode as fast as its GPUs compute.
        read_rate: GB/s of photographs.
        index_memory: GiB for the index of all samples (once) and for their order (in each rank).
    """

    loader_cores: float
    read_rate: float
    index_memory: float


@dataclass(frozen=True)
class Plan:
    """What the planner says about a recipe on a cluster.

    Attributes:
        trace, step, communication: at `data.image_size`, like all properties except those of the whole run.
        stages: at the image size that needs the most memory.
        earlier: with `data.size_schedule`, the number of epochs and the plan of each earlier size.
    """

    config: PretrainConfig
    cluster: Cluster
    images: int
    numerics: Numerics
    zero: Zero
    trace: Trace
    micro_batch: int
    step: Step
    communication: Communication
    stages: tuple[StageMemory, ...]
    earlier: tuple[tuple[int, "Plan"], ...] = ()
    photographs: Photographs = IMAGENET

    @property
    def sizes(self) -> tuple[tuple[int, "Plan"], ...]:
        """The number of epochs and the plan of each image size."""
        return *self.earlier, (self.config.train.epochs - sum(epochs for epochs, _ in self.earlier), self)

    @property
    def steps(self) -> int:
        train = self.config.train
        return train.epochs * steps_per_epoch(self.images, train.global_batch_size)

    @property
    def images_per_second(self) -> float:
        """The rate of all GPUs together."""
        return self.config.train.global_batch_size / self.step.total

    @property
    def hours(self) -> float:
        """Hours of the whole run."""
        return sum(plan.hours_of(epochs) for epochs, plan in self.sizes)

    @property
    def hours_without_wait(self) -> float:
        """Hours of the whole run if no GPU had to wait for data."""
        return sum(plan.hours_of(epochs) * (1 - plan.step.data / plan.step.total) for epochs, plan in self.sizes)

    def hours_of(self, epochs: int) -> float:
        """Hours of `epochs` epochs at this plan's image size."""
        return epochs * self.steps / self.config.train.epochs * self.step.total / 3600

    @property
    def mfu(self) -> float:
        """Model flops (a backward pass counts twice) as a share of the data sheet's peak."""
        rate = self.images_per_second / self.cluster.gpus * image_flops(self.trace)
        return rate / (peak(self.cluster.gpu, self.numerics) * 1e12)

    @property
    def limit(self) -> str:
        """What most of a step is spent on; `data` if GPUs wait for the loader."""
        limits = self.step.limits
        return "data" if limits["data"] > 0.02 * self.step.total else max(limits, key=lambda name: limits[name])

    @property
    def memory(self) -> Memory:
        """Memory in the recipe's own stage."""
        stage = next(stage for stage in self.stages if stage.zero.stage == self.zero.stage)
        return stage.checkpointed if self.config.model.grad_checkpointing else stage.memory

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.cluster.gpu.memory * GIB

    @property
    def computed_rate(self) -> float:
        """Images a second that the GPUs compute if they do not wait for data."""
        return self.config.train.global_batch_size / (self.step.total - self.step.data)

    @property
    def loader_cores(self) -> float:
        """Cores of all nodes that decode as fast as the GPUs compute, at the image size that needs the most."""
        return max(plan.computed_rate * plan.core_seconds for _, plan in self.sizes)

    @property
    def node_needs(self) -> "NodeNeeds":
        """What a node must provide besides GPUs."""
        fastest = max(plan.computed_rate for _, plan in self.sizes)
        return NodeNeeds(
            self.loader_cores / self.cluster.nodes,
            fastest / self.cluster.nodes * self.photographs.bytes / 1e9 / self.config.data.repeats,
            index_bytes(self.images, self.cluster.per_node) / GIB,
        )

    @property
    def core_seconds(self) -> float:
        data = self.config.data
        return core_seconds(data.height_width, self.config.augmentations, data.repeats, self.photographs)


def make_plan(
    config: PretrainConfig,
    cluster: Cluster,
    images: int,
    numerics: Numerics,
    trace: Trace,
    earlier: Sequence[Trace] = (),
    photographs: Photographs = IMAGENET,
) -> Plan:
    """The plan of a configuration; `earlier` are the traces at the image sizes before the last one.

    Raises:
        ValueError: the GPUs do not divide the batch, the GPU does not support the recipe's precision, or there are
            fewer images than a batch.
    """
    check_gpus(config, cluster)
    numerics = replace(numerics, hopper=cluster.gpu.hopper)
    train = config.train
    steps_per_epoch(images, train.global_batch_size)
    zero = own_zero(config)
    micro_batch = train.global_batch_size // (cluster.gpus * train.gradient_accumulation_steps)
    step, communication = step_time(config, cluster, numerics, zero, trace, micro_batch, photographs)
    stages = tuple(
        _stage_memory(cluster, numerics, trace, micro_batch, zero if zero.stage == stage else shipped_zero(stage))
        for stage in range(4)
    )
    kept = communication, stages, (), photographs
    plan = Plan(config, cluster, images, numerics, zero, trace, micro_batch, step, *kept)
    return _with_earlier(plan, earlier) if earlier else plan


def _with_earlier(plan: Plan, traces: Sequence[Trace]) -> Plan:
    """The plan of the last image size, with those of the earlier sizes."""
    begin, parts = 0, []
    for (end, config), trace in zip(plan.config.earlier, traces, strict=True):
        part = make_plan(config, plan.cluster, plan.images, plan.numerics, trace, (), plan.photographs)
        parts.append((end - begin, part))
        begin = end
    largest = max([plan, *(part for _, part in parts)], key=lambda part: part.memory.total)
    return replace(plan, stages=largest.stages, earlier=tuple(parts))


def check_gpus(config: PretrainConfig, cluster: Cluster) -> None:
    """Raises the ValueError of `make_plan` about GPUs."""
    train = config.train
    if train.precision == "bf16" and not cluster.gpu.bf16:
        raise ValueError("this GPU does not support bf16: set train.precision=fp32, or use an a100, l40s or newer")
    check_divisible(train.global_batch_size, cluster.gpus, train.gradient_accumulation_steps)


def own_zero(config: PretrainConfig) -> Zero:
    """The recipe's engine keys, with `auto` chosen as in a run: an existing run keeps its stage."""
    return Zero.of(read_ds_config(choose_ds_config(config)))


def shipped_zero(stage: int) -> Zero:
    """The engine keys of ds_configs/ for a stage."""
    return Zero.of(read_ds_config(f"zero{stage}"))


def _stage_memory(cluster: Cluster, numerics: Numerics, trace: Trace, micro_batch: int, zero: Zero) -> StageMemory:
    if zero.stage == 3:  # torch.compile loses gradients there, and CUDA graphs have no place for its weights
        numerics = replace(numerics, compile=False, cuda_graphs=False)
    found: list[tuple[Memory, int]] = []
    for checkpointing in (False, True):
        memory = step_memory(trace, numerics, zero, cluster.gpus, micro_batch, checkpointing)
        largest = largest_micro_batch(trace, numerics, zero, cluster.gpus, cluster.gpu.memory * GIB, checkpointing)
        found.append((memory, largest))
    return StageMemory(zero, *found[0], *found[1])


def choose_numerics(config: PretrainConfig, cluster: Cluster) -> Numerics:
    """The numerics that `auto` means on the cluster's GPU, as chosen by `pretrain.numerics`.

    Raises:
        ValueError: a setting cannot work; the message names the key to change.
    """
    model, stage = config.model, own_zero(config).stage
    check_settings(config, stage)
    obstacle = unserved_by_window_kernel(config)
    if model.attention == "triton" and obstacle:
        raise ValueError(f"model.attention=triton cannot be used: {obstacle}; set model.attention=auto")
    return Numerics(
        compile=model.compile != "off" and stage < 3,
        residual=model.residual,
        attention="triton" if model.attention != "sdpa" and not obstacle else "sdpa",
        precision=config.train.precision,
        hopper=cluster.gpu.hopper,
        cuda_graphs=wants_cuda_graphs(config, stage),
    )
