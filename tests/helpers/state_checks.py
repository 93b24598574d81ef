"""One rank of a launch that moves weights, buffers and moments exactly between engines of different ZeRO stages."""

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from helpers.rank_checks import assert_same_bits
from helpers.steps import BATCH, begin_elsewhere, build_small, configure, global_batch, small_settings
from pretrain.trainer.ema import NoEMA
from pretrain.trainer.launch import World, exit_process, find_world, init_distributed
from pretrain.trainer.optim import build_adamw, parameter_groups

UPDATES = 2
PAIRS = (
    ("zero0", "zero3"),
    ("zero3", "zero1"),
    ("zero1", "zero2_offload"),
    ("zero2_offload", "zero3_offload"),
    ("zero2", "zero0"),
)


def build(recipe: str, engine: str, world: World, elsewhere: bool) -> tuple[Any, Any]:
    from pretrain.trainer.engine import build_engine, zero_stage

    config = configure(recipe, f"train.ds_config={engine}")
    method = begin_elsewhere(config) if elsewhere else build_small(config)
    settings = small_settings(config, world.size)
    optimizer = build_adamw(parameter_groups(method, config.optim.weight_decay), config, zero_stage(settings))
    return config, build_engine(method, optimizer, config, settings)


def step(engine: Any, config: Any, number: int, world: World) -> None:
    images, mask_indices = global_batch(number, engine.module.mask_sampler(), config)
    mine = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    engine.backward(engine(images[mine], {name: index[mine] for name, index in mask_indices.items()})["loss"])
    engine.step()


def live_moments(engine: Any) -> dict[str, dict[str, Tensor]]:
    """Return the complete moments, as found by DeepSpeed itself."""
    from deepspeed.utils import safe_get_full_optimizer_state

    def find(parameter: Tensor, kind: str) -> Tensor:
        if engine.zero_optimization_stage():
            return safe_get_full_optimizer_state(parameter, kind).clone()
        return engine.basic_optimizer.state[parameter][kind].clone()

    if engine.zero_optimization_stage() in (1, 2):  # DeepSpeed links them too early, after the first group's step
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    named = list(engine.module.named_parameters())
    return {kind: {name: find(p, kind) for name, p in named} for kind in ("exp_avg", "exp_avg_sq")}


def live_weights(engine: Any) -> dict[str, Tensor]:
    """Return the weights that the optimizer trains, as found by DeepSpeed, and the buffers."""
    from deepspeed.utils import safe_get_full_fp32_param

    stage = engine.zero_optimization_stage()
    named = engine.module.named_parameters()
    weights = {name: (safe_get_full_fp32_param(p) if stage else p.detach()).clone() for name, p in named}
    return weights | {name: buffer.clone() for name, buffer in engine.module.named_buffers()}


def counts(engine: Any) -> set[float]:
    return {float(state["step"]) for state in engine.basic_optimizer.state.values()}


def check(recipe: str, first: str, second: str, folder: Path, world: World) -> None:
    """Move the state to an engine that started with another seed, and check that Adam continues from there."""
    from pretrain.trainer.checkpoint import Checkpoints
    from pretrain.trainer.checkpoint_layout import TrainState, checkpoint_name
    from pretrain.trainer.engine import gather_state_dict
    from pretrain.trainer.moments import read_moments, set_moments
    from pretrain.trainer.stored_state import StoredState

    config, engine = build(recipe, first, world, elsewhere=False)
    stage = engine.zero_optimization_stage()
    for number in range(UPDATES):
        step(engine, config, number, world)
    moments, weights, whole = live_moments(engine), live_weights(engine), gather_state_dict(engine, world)
    state = TrainState(step=UPDATES, updates=UPDATES, world_size=world.size, zero_stage=stage)
    checkpoints = Checkpoints(folder, world, config.checkpoint)
    assert checkpoints.begin(engine, NoEMA(), state).wait() is None
    engine.destroy()
    stored = StoredState(folder / checkpoint_name(UPDATES))
    assert stored.step == UPDATES
    for kind, average in moments.items():
        assert_same_bits({name: stored.moment(name, kind) for name in average}, average)
    assert_same_bits({name: stored.weight(name) for name in moments["exp_avg"]}, {n: weights[n] for n in stored.shapes})

    config, engine = build(recipe, second, world, elsewhere=True)
    other = engine.zero_optimization_stage()
    fresh = TrainState(world_size=world.size, zero_stage=other)
    assert checkpoints.resume(engine, NoEMA(), fresh)[0].step == UPDATES
    assert_same_bits(live_weights(engine), weights)
    assert_same_bits(gather_state_dict(engine, world), whole)
    assert_same_bits(live_moments(engine), moments)
    assert engine.global_steps == UPDATES
    step(engine, config, UPDATES, world)
    assert counts(engine) == {UPDATES + 1.0}
    engine.destroy()

    config, engine = build(recipe, second, world, elsewhere=True)
    left_out = next(iter(moments["exp_avg"]))
    names = {name: name for name in moments["exp_avg"] if name != left_out}
    set_moments(engine, read_moments(folder / checkpoint_name(UPDATES)).renamed(names))
    expected = {kind: {n: 0 * t if n == left_out else t for n, t in found.items()} for kind, found in moments.items()}
    assert_same_bits(live_moments(engine), expected)
    step(engine, config, UPDATES, world)
    assert counts(engine) == ({1.0, UPDATES + 1.0} if other == 0 else {UPDATES + 1.0})
    engine.destroy()


def check_order(recipe: str, folder: Path, world: World) -> None:
    """Resume the same stage and ranks with another parameter order, and back, which DeepSpeed cannot do itself."""
    from pretrain.trainer.checkpoint import Checkpoints
    from pretrain.trainer.checkpoint_layout import TrainState, checkpoint_name
    from pretrain.trainer.elastic import has_other_parts
    from pretrain.trainer.stored_state import StoredState

    state = TrainState(step=UPDATES, updates=UPDATES, world_size=world.size, zero_stage=1)
    config, engine = build(recipe, "zero1", world, elsewhere=False)
    for number in range(UPDATES):
        step(engine, config, number, world)
    moments, weights = live_moments(engine), live_weights(engine)
    plain, ordered = (Checkpoints(folder / name, world, config.checkpoint) for name in ("plain", "ordered"))
    assert plain.begin(engine, NoEMA(), state).wait() is None
    engine.destroy()
    ordered_file = folder / "ordered.json"
    if world.is_main:
        ordered_file.write_text(json.dumps({"zero_optimization": {"stage": 1, "round_robin_gradients": True}}))
    dist.barrier()
    _, engine = build(recipe, str(ordered_file), world, elsewhere=True)
    plain.resume(engine, NoEMA(), state)
    assert ordered.begin(engine, NoEMA(), state).wait() is None
    engine.destroy()
    stored = StoredState(folder / "ordered" / checkpoint_name(UPDATES))
    for kind, average in moments.items():
        assert_same_bits({name: stored.moment(name, kind) for name in average}, average)
    _, engine = build(recipe, "zero1", world, elsewhere=True)
    found = [has_other_parts(engine, one.folder / checkpoint_name(UPDATES), state, state) for one in (plain, ordered)]
    assert found == [False, True]
    ordered.resume(engine, NoEMA(), state)
    assert_same_bits(live_weights(engine), weights)
    assert_same_bits(live_moments(engine), moments)
    engine.destroy()


def main() -> None:
    world = find_world()
    init_distributed(world)
    check_order(sys.argv[1], Path(sys.argv[2]), world)
    for first, second in PAIRS:
        check(sys.argv[1], first, second, Path(sys.argv[2]) / first, world)
        print(f"{first} -> {second}: the same", flush=True)
    exit_process(0)


if __name__ == "__main__":
    main()
