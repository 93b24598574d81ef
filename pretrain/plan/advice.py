"""What would make a planned run faster: other settings, planned in the same way."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pretrain.config import PretrainConfig
from pretrain.methods import METHODS
from pretrain.models.vit import ARCHS
from pretrain.numerics import cuda_graphs_obstacle
from pretrain.plan.estimate import Plan, choose_numerics, make_plan
from pretrain.plan.loader_cost import SMALLER
from pretrain.plan.trace import trace_sizes
from pretrain.trainer.recipe import merge

LEAST_GAIN = 1.03
SMALL_ENOUGH = 288  # pixels: photographs that were shrunk this far are too small for larger views


@dataclass(frozen=True)
class Advice:
    """A change and its gain.

    Attributes:
        change: keys to set, or a command to run.
        gain: how many times faster the run would be.
        note: what else it changes.
    """

    change: str
    gain: float
    note: str = ""


def advise(plan: Plan) -> list[Advice]:
    """Worthwhile changes, the largest gain first."""
    found = [_planned(plan, changes, note) for changes, note in _candidates(plan)]
    advice = [item for item in found if item and item.gain >= LEAST_GAIN]
    if plan.step.total / (plan.step.total - plan.step.data) >= LEAST_GAIN:
        advice = [*_feeding(plan), *advice]
    return sorted(advice, key=lambda item: -item.gain)


def _feeding(plan: Plan) -> Iterator[Advice]:
    """Advice for GPUs that wait for data: more cores, or less to decode."""
    wait = plan.step.total / (plan.step.total - plan.step.data)
    yield Advice(f"data.num_workers={_workers(plan)}", wait, "this many cores for each GPU")
    config, data = plan.config, plan.config.data
    *earlier, trace = [part.trace for _, part in plan.sizes]
    known = plan.cluster, plan.images, plan.numerics, trace, earlier
    if plan.photographs.bytes > SMALLER.bytes and max(data.height_width) <= SMALL_ENOUGH:
        smaller = make_plan(config, *known, SMALLER)
        note = "a third of the bytes per photograph: loses fine detail"
        yield Advice(f"python -m data.pack {SMALLER.shrunk}", plan.hours / smaller.hours, note)
    try:
        twice = merge(config.model_dump(), {"data": {"repeats": 2 * data.repeats}}, PretrainConfig)
        repeated = make_plan(PretrainConfig.model_validate(twice), *known, plan.photographs)
    except ValueError:
        return  # repeats do not fit the number of epochs or the loss
    note = "this many crops of each decoded photograph, side by side in a batch"
    yield Advice(f"data.repeats={2 * data.repeats}", plan.hours / repeated.hours, note)


def _candidates(plan: Plan) -> list[tuple[dict[str, Any], str]]:
    config, gpus = plan.config, plan.cluster.gpus
    model, method = config.model, config.method
    candidates: list[tuple[dict[str, Any], str]] = []
    if not plan.numerics.compile and plan.zero.stage < 3:
        candidates.append(({"model": {"compile": "on"}}, ""))
    if not plan.numerics.cuda_graphs and not cuda_graphs_obstacle(config, plan.zero.stage):
        candidates.append(({"model": {"cuda_graphs": "on"}}, "see docs/speed.md"))
    if plan.zero.stage in (1, 2):
        candidates.append(({"train": {"ds_config": "zero0"}}, "no wait for the gradient's norm; more memory"))
    if plan.numerics.residual == "fp32" and config.train.precision == "bf16":
        candidates.append(({"model": {"residual": "bf16"}}, "less exact"))
    if plan.numerics.attention == "sdpa":
        candidates.append(({"model": {"attention": "triton"}}, ""))
    if model.grad_checkpointing:
        candidates.append(({"model": {"grad_checkpointing": False}}, "if memory allows"))
    if "pr_mim" in METHODS[method.name].add_ons and not config.pr_mim:
        candidates.append(({"pr_mim": {"throw_ratio": 0.5}}, "another method: PR-MIM"))
    if getattr(method, "mask_token_block", None) == 0:
        block = ARCHS[model.arch].depth * 2 // 3
        candidates.append(({"method": {"mask_token_block": block}}, "another method: late mask tokens"))
        if not config.pr_mim:
            both = {"method": {"mask_token_block": block}, "pr_mim": {"throw_ratio": 0.5}}
            candidates.append((both, "another method: both"))
    if gpus > 1 and plan.zero.stage != 1:
        candidates.append(({"train": {"ds_config": "zero1"}}, ""))
    doubled = config.train.global_batch_size * 2
    if doubled <= plan.images:
        more = {"train": {"global_batch_size": doubled}}
        candidates.append((more, "half as many updates, each with twice the learning rate"))
    return candidates


def _planned(plan: Plan, changes: dict[str, Any], note: str) -> Advice | None:
    try:
        config = PretrainConfig.model_validate(merge(plan.config.model_dump(), changes, PretrainConfig))
        numerics = choose_numerics(config, plan.cluster)
        traces = [part.trace for _, part in plan.sizes]
        *earlier, trace = trace_sizes(config) if changes.keys() & {"method", "pr_mim"} else traces
        other = make_plan(config, plan.cluster, plan.images, numerics, trace, earlier, plan.photographs)
    except ValueError:
        return None  # these keys do not fit this recipe, so they are no advice
    if not other.fits and plan.fits:
        return None
    keys = [f"{section}.{key}={_yaml(value)}" for section, values in changes.items() for key, value in values.items()]
    if other.step.data:  # the gain of the change itself, and what the loader then needs
        keys.append(f"data.num_workers={_workers(other)}")
    return Advice(" ".join(keys), plan.hours_without_wait / other.hours_without_wait, note)


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _workers(plan: Plan) -> int:
    """Workers of each rank so that its GPU does not wait."""
    return math.ceil(plan.loader_cores / plan.cluster.gpus)
