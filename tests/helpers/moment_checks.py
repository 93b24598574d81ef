"""One rank of a launch: AdamW's moments go from engines of every ZeRO stage through checkpoints into another's."""

import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from helpers.rank_checks import assert_same_bits
from helpers.steps import BATCH, build_small, configure, global_batch, small_settings
from pretrain.trainer.ema import NoEMA
from pretrain.trainer.launch import World, exit_process, find_world, init_distributed
from pretrain.trainer.optim import build_adamw, parameter_groups

UPDATES = 2


def build(recipe: str, stage: int, world: World) -> tuple[Any, Any]:
    from pretrain.trainer.engine import build_engine

    config = configure(recipe, f"train.ds_config=zero{stage}")
    method = build_small(config)
    optimizer = build_adamw(parameter_groups(method, config.optim.weight_decay), config, stage)
    return config, build_engine(method, optimizer, config, small_settings(config, world.size))


def step(engine: Any, config: Any, number: int, world: World) -> None:
    images, mask_indices = global_batch(number, engine.module.mask_sampler(), config)
    mine = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    engine.backward(engine(images[mine], {name: index[mine] for name, index in mask_indices.items()})["loss"])
    engine.step()


def live_moments(engine: Any) -> dict[str, dict[str, Tensor]]:
    """Whole, as DeepSpeed itself finds them."""
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


def check(recipe: str, stage: int, other: int, folder: Path, world: World) -> None:
    """From an engine of one stage into one of another, which then goes on as Adam does."""
    from pretrain.trainer.checkpoint import Checkpoints
    from pretrain.trainer.checkpoint_layout import TrainState, checkpoint_name
    from pretrain.trainer.moments import read_moments, set_moments

    config, engine = build(recipe, stage, world)
    for number in range(UPDATES):
        step(engine, config, number, world)
    expected = live_moments(engine)
    state = TrainState(step=UPDATES, updates=UPDATES, world_size=world.size, zero_stage=stage)
    assert Checkpoints(folder, world, config.checkpoint).save(engine, NoEMA(), state) is None
    engine.destroy()
    moments = read_moments(folder / checkpoint_name(UPDATES))
    assert_same_bits(
        {kind: {n: average[n] for n in expected[kind]} for kind, average in moments.averages.items()}, expected
    )
    config, engine = build(recipe, other, world)
    left_out = next(iter(expected["exp_avg"]))
    set_moments(engine, moments.renamed({name: name for name in expected["exp_avg"] if name != left_out}))
    expected = {kind: {n: 0 * t if n == left_out else t for n, t in found.items()} for kind, found in expected.items()}
    if other:
        assert_same_bits(live_moments(engine), expected)
    step(engine, config, UPDATES, world)
    steps = {float(state["step"]) for state in engine.basic_optimizer.state.values()}
    assert steps == ({1.0, UPDATES + 1.0} if other == 0 else {UPDATES + 1.0}), steps
    engine.destroy()


def main() -> None:
    world = find_world()
    init_distributed(world)
    for stage, other in ((0, 3), (3, 1), (1, 2), (2, 0)):
        check(sys.argv[1], stage, other, Path(sys.argv[2]) / f"zero{stage}", world)
        print(f"zero{stage} -> zero{other}: the same", flush=True)
    exit_process(0)


if __name__ == "__main__":
    main()
