"""A plan as text and as JSON."""

from dataclasses import asdict
from typing import Any

from data.cores import AUTO, MOST_WORKERS
from data.messages import counted
from pretrain.plan.advice import Advice
from pretrain.plan.estimate import Plan, StageMemory
from pretrain.plan.hardware import Cluster
from pretrain.plan.memory import GIB, Memory
from pretrain.plan.step_time import image_flops

USUAL_MEMORY = 1024  # GiB of a node's host
_COLUMNS = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "AdamW",
    "deepspeed": "engine",
    "casts": "casts",
    "activations": "kept",
    "workspace": "work",
    "teacher": "teacher",
}


def render(plan: Plan, gpu: str, advice: list[Advice]) -> str:
    """The whole plan, for a console 100 characters wide."""
    sizes = [_sizes(plan)] if plan.earlier else []
    return "\n\n".join([_head(plan, gpu), *sizes, _memory(plan, gpu), _step(plan), _host(plan), _limits(plan, advice)])


def _head(plan: Plan, gpu: str) -> str:
    config, cluster, numerics = plan.config, plan.cluster, plan.numerics
    train = config.train
    size = "x".join(map(str, config.data.height_width))
    return "\n".join(
        [
            f"{config.name}: {config.task}, {config.model.arch}/{config.model.patch_size} at {size}, "
            f"{plan.trace.parameters / 1e6:.1f} M parameters, {image_flops(plan.trace) / 1e9:.1f} GFLOP per image",
            f"{cluster.gpus} x {gpu} in {counted(cluster.nodes, 'node')} of {cluster.per_node}, "
            f"ZeRO {plan.zero.stage}; compile {'on' if numerics.compile else 'off'}, residual {numerics.residual}, "
            f"attention {numerics.attention}, {numerics.precision}",
            f"batch {train.global_batch_size} = {counted(cluster.gpus, 'GPU')} x {train.gradient_accumulation_steps} "
            f"accumulation x {plan.micro_batch}",
            f"{plan.images:,} images, {train.epochs} epochs: {plan.steps:,} steps, {plan.hours:,.1f} hours, "
            f"{plan.hours * cluster.gpus:,.0f} GPU-hours; {plan.images_per_second:,.0f} images/s, "
            f"MFU {plan.mfu:.0%}",
        ]
    )


def _sizes(plan: Plan) -> str:
    """The parts of a run with several image sizes."""
    lines = ["by image size (below: the last size; memory and cores: the size that needs the most)"]
    lines.append(f"{'size':>9}{'epochs':>8}{'GFLOP':>8}{'ms per step':>12}{'images/s':>10}{'hours':>8}")
    for epochs, part in plan.sizes:
        size, step = "x".join(map(str, part.config.data.height_width)), part.step.total * 1e3
        lines.append(
            f"{size:>9}{epochs:8}{image_flops(part.trace) / 1e9:8.1f}{step:12,.1f}{part.images_per_second:10,.0f}"
            f"{part.hours_of(epochs):8.1f}"
        )
    return "\n".join(lines)


def _memory(plan: Plan, gpu: str) -> str:
    capacity = plan.cluster.gpu.memory
    lines = [
        f"GiB per GPU ({capacity:g} on {gpu}) at the peak of a step, and the largest micro-batch that fits",
        f"{'ZeRO':22}" + "".join(f"{name:>9}" for name in _COLUMNS.values()) + f"{'total':>8}{'largest':>9}",
    ]
    for stage in plan.stages:
        for checkpointing in (False, True):
            memory = stage.checkpointed if checkpointing else stage.memory
            largest = stage.largest_checkpointed if checkpointing else stage.largest
            own = stage.zero.stage == plan.zero.stage and checkpointing == plan.config.model.grad_checkpointing
            name = (
                f"{'*' if own else ' '} {stage.zero.stage}{_offload(stage)}{', checkpointing' if checkpointing else ''}"
            )
            cells = "".join(f"{getattr(memory, column) / GIB:9.2f}" for column in _COLUMNS)
            lines.append(f"{name:22}{cells}{memory.total / GIB:8.1f}{largest:9,}")
    found = [memory for stage in plan.stages for memory in (stage.memory, stage.checkpointed)]
    if not all(memory.activations for memory in found):
        lines.append("casts and kept 0.00: the peak is in the optimizer's step, which has neither")
    if not plan.fits:
        lines.append(f"does not fit: {_how_to_fit(plan)}")
    return "\n".join(lines)


def _offload(stage: StageMemory) -> str:
    return " offload" if stage.zero.offload_optimizer else ""


def _how_to_fit(plan: Plan) -> str:
    """The accumulation that makes the recipe's own stage fit; if none does, checkpointing or another stage."""
    train, gpus = plan.config.train, plan.cluster.gpus
    own = next(stage for stage in plan.stages if stage.zero.stage == plan.zero.stage)
    checkpointing = plan.config.model.grad_checkpointing
    largest = own.largest_checkpointed if checkpointing else own.largest
    share = train.global_batch_size // gpus
    accumulation = next((n for n in range(1, share + 1) if share % n == 0 and share // n <= largest), None)
    if accumulation is not None:
        return f"set train.gradient_accumulation_steps={accumulation}"
    if not checkpointing and own.largest_checkpointed:
        return "set model.grad_checkpointing=true"
    fitting = [stage.zero.stage for stage in plan.stages if max(stage.largest, stage.largest_checkpointed)]
    if fitting:
        return f"set train.ds_config=zero{fitting[0]}, with model.grad_checkpointing=true where needed"
    return "not even one image fits on this GPU in any stage: use a larger GPU or a smaller model.arch"


def _step(plan: Plan) -> str:
    step = plan.step
    parts = {
        "matrix products": step.matrices,
        "attention": step.attention,
        "element-wise": step.elementwise,
        "depth-wise convolution": step.convolution,
        "outside blocks": step.ends,
        "recomputed": step.recomputed,
        "weight casts": step.casts,
        "optimizer": step.optimizer,
        "communication, exposed": step.communication,
        "waiting for the host": step.host,
        "waiting for data": step.data,
    }
    lines = [f"ms per step: {step.total * 1e3:,.1f}"]
    lines += [
        f"  {name:24}{seconds * 1e3:10,.1f}{seconds / step.total:7.0%}" for name, seconds in parts.items() if seconds
    ]
    if plan.cluster.gpus > 1:
        lines += _links(plan)
    return "\n".join(lines)


def _links(plan: Plan) -> list[str]:
    cluster, sent = plan.cluster, plan.communication
    lines = ["communication per step:"]
    lines.append(
        f"  {cluster.link + ' within a node':24}{sent.node_seconds * 1e3:10,.1f}   "
        f"{sent.node_bytes / 1e9:.2f} GB per GPU"
    )
    if cluster.nodes > 1:
        name = f"network, {cluster.network:g} Gb/s"
        size = f"{sent.network_bytes / 1e9:.2f} GB per node"
        lines.append(f"  {name:24}{sent.network_seconds * 1e3:10,.1f}   {size}")
    lines.append(f"  {'both at once':24}{sent.seconds * 1e3:10,.1f}   {sent.exposed * 1e3:,.1f} of it not hidden")
    return lines


def _host(plan: Plan) -> str:
    needs = plan.node_needs
    size = plan.photographs.bytes
    shrunk = f" ({plan.photographs.shrunk})" if plan.photographs.shrunk else ""
    warning = ", MORE THAN NODES USUALLY HAVE" if needs.index_memory > USUAL_MEMORY else ""
    return (
        f"data, per node: {needs.loader_cores:,.0f} cores decode as fast as its GPUs compute ("
        f"{_workers(plan)}), "
        f"{needs.read_rate:.2f} GB/s are read;\n"
        f"the index takes {needs.index_memory:,.1f} GiB of host memory{warning}; all photographs take "
        f"{plan.images * size / 1e12:,.2f} TB at {size / 1e3:.0f} KB each{shrunk}"
    )


def _workers(plan: Plan) -> str:
    workers, ranks = plan.config.data.num_workers, counted(plan.cluster.per_node, "rank")
    if workers == AUTO:
        return f"data.num_workers=auto uses what {ranks} have, up to {MOST_WORKERS} each"
    return f"data.num_workers={workers} on {ranks} makes {workers * plan.cluster.per_node}"


def _limits(plan: Plan, advice: list[Advice]) -> str:
    total = plan.step.total
    shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in plan.step.limits.items() if seconds)
    lines = [f"limited by {plan.limit} ({shares})"]
    if advice:
        lines.append("what would help:")
        width = max(len(item.change) for item in advice)
        lines += [f"  {item.gain:5.2f}x  {item.change:{width}}  {item.note}".rstrip() for item in advice]
    return "\n".join(lines)


def as_json(plan: Plan, gpu: str, advice: list[Advice]) -> dict[str, Any]:
    """All of the plan's numbers; names without a unit mean bytes or seconds, except in `NodeNeeds`."""
    return {
        "recipe": plan.config.name,
        "gpu": gpu,
        "gpus": plan.cluster.gpus,
        "gpus_per_node": plan.cluster.per_node,
        "network_gbits": plan.cluster.network,
        "images": plan.images,
        "photographs": plan.photographs._asdict(),
        "parameters": plan.trace.parameters,
        "flops_per_image": image_flops(plan.trace),
        "numerics": asdict(plan.numerics),
        "zero_stage": plan.zero.stage,
        "micro_batch": plan.micro_batch,
        "steps": plan.steps,
        "sizes": [
            {
                "size": part.config.data.height_width,
                "epochs": epochs,
                "step_seconds": part.step.total,
                "images_per_second": part.images_per_second,
                "hours": part.hours_of(epochs),
            }
            for epochs, part in plan.sizes
        ],
        "step_seconds": plan.step.total,
        "step_parts": asdict(plan.step),
        "communication": asdict(plan.communication),
        "images_per_second": plan.images_per_second,
        "mfu": plan.mfu,
        "hours": plan.hours,
        "gpu_hours": plan.hours * plan.cluster.gpus,
        "memory": [_stage_json(stage, plan.cluster) for stage in plan.stages],
        "fits": plan.fits,
        "node": asdict(plan.node_needs),
        "limit": plan.limit,
        "advice": [asdict(item) for item in advice],
    }


def _stage_json(stage: StageMemory, cluster: Cluster) -> dict[str, Any]:
    def memory(found: Memory, largest: int) -> dict[str, Any]:
        return {**asdict(found), "total": found.total, "largest_micro_batch": largest}

    return {
        "stage": stage.zero.stage,
        "gpu_bytes": cluster.gpu.memory * GIB,
        "plain": memory(stage.memory, stage.largest),
        "checkpointing": memory(stage.checkpointed, stage.largest_checkpointed),
    }
