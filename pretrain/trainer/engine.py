"""Builds the DeepSpeed engine from ds_configs and the recipe, and reads back the settings that it really uses."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.order import check_divisible
from pretrain.trainer.checkpoint_layout import checkpoint_names, read_state
from pretrain.trainer.config import AUTO, RunConfig
from pretrain.trainer.engine_file import check_sections, read_ds_config
from pretrain.trainer.launch import World, import_deepspeed
from pretrain.trainer.nonfinite import NonfiniteGuard
from pretrain.trainer.run_folder import RunFolder


def choose_ds_config(config: RunConfig) -> str:
    """`train.ds_config`; for `auto`, the name in ds_configs/ that it stands for.

    `auto` keeps the ZeRO stage of the run's newest checkpoint; a new run gets stage 0, which never waits for the GPU.
    All ranks of a process group call it together; the first one's choice counts.
    """
    if config.train.ds_config != AUTO:
        return config.train.ds_config
    stage = [_checkpoint_stage(RunFolder(Path(config.runs) / config.name).checkpoints)]
    if dist.is_initialized():
        dist.broadcast_object_list(stage)  # a shared disk may not look the same to all ranks
    return f"zero{stage[0] or 0}"


def _checkpoint_stage(checkpoints: Path) -> int | None:
    """The ZeRO stage of a run's newest checkpoint with a readable manifest; None if there is none."""
    for name in checkpoint_names(checkpoints):
        try:
            return read_state(checkpoints / name).zero_stage
        except ValueError:
            continue  # `Checkpoints.resume` reports damage
    return None


def ds_settings(config: RunConfig, world_size: int) -> dict[str, Any]:
    """All of DeepSpeed's keys for a run; those with surprising defaults are set explicitly.

    All ranks of a process group call it together.

    Raises:
        ValueError: as `read_ds_config`, or ranks and micro-batches do not divide the global batch.
    """
    train = config.train
    accumulation = train.gradient_accumulation_steps
    check_divisible(train.global_batch_size, world_size, accumulation)
    return complete_settings(
        read_ds_config(choose_ds_config(config)),
        micro_batch=train.global_batch_size // (world_size * accumulation),
        accumulation=accumulation,
        world_size=world_size,
        clip_grad=config.optim.clip_grad,
        bf16=train.precision == "bf16",
    )


def check_engine(config: RunConfig, world: World) -> None:
    """Raises ValueError, as `ds_settings`, before anything is read or started."""
    import_deepspeed()
    ds_settings(config, world.size)


def check_engine_file(config: RunConfig) -> None:
    """Like `check_engine`, for a configuration that is only shown; `auto` is not checked."""
    if config.train.ds_config != AUTO:
        import_deepspeed()
        ds_settings(config, world_size=1)


def complete_settings(
    keys: dict[str, Any], *, micro_batch: int, accumulation: int, world_size: int, clip_grad: float, bf16: bool
) -> dict[str, Any]:
    """The engine keys of a file and those that the recipe owns; those with surprising defaults are set explicitly.

    Raises:
        ValueError: DeepSpeed refuses them.
    """
    settings = {
        "train_batch_size": micro_batch * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_grad,  # DeepSpeed's default is 1.0
        # Autocast rather than DeepSpeed's bf16 mode: parameters, norms and their gradients stay fp32 in every stage.
        "torch_autocast": {
            "enabled": bf16,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # gradients are summed over ranks and micro-batches in fp32
        },
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True,  # torch's AdamW
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice per micro-batch
        **keys,
    }
    check_sections(settings)
    return settings


def zero_stage(settings: dict[str, Any]) -> int:
    """The ZeRO stage in DeepSpeed's keys."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def build_engine(
    module: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig, settings: dict[str, Any]
) -> Any:
    """The DeepSpeed engine that trains a module.

    Args:
        optimizer: for the module's parameters; in stage 0 a `NonfiniteGuard`.
        settings: DeepSpeed's keys, from `ds_settings`.
    """
    import deepspeed

    if not zero_stage(settings):
        assert isinstance(optimizer, NonfiniteGuard)
        optimizer.clip_grad = config.optim.clip_grad
        settings = {**settings, "gradient_clipping": 0.0}  # or DeepSpeed would clip before the norm is known
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    if not zero_stage(settings) and dist.get_world_size() == 1:
        engine.enable_backward_allreduce = False  # it would copy all gradients twice for a sum over one rank
    return engine


def effective_settings(engine: Any) -> dict[str, Any]:
    """The settings that are in effect, read back from the engine."""
    model_dtype, accumulation_dtype = engine.get_data_types()
    return {
        "zero_stage": engine.zero_optimization_stage(),
        "train_batch_size": engine.train_batch_size(),
        "micro_batch_per_rank": engine.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        "gradient_clipping": getattr(engine.basic_optimizer, "clip_grad", engine.gradient_clipping()),
        "autocast": str(engine.torch_autocast_dtype()) if engine.torch_autocast_enabled() else "off",
        "parameter_dtype": str(model_dtype),
        "gradient_accumulation_dtype": str(accumulation_dtype),
        "optimizer": type(engine.optimizer).__name__,
        "basic_optimizer": type(engine.basic_optimizer).__name__,
        "fused_optimizer": bool(engine.basic_optimizer.defaults.get("fused")),
        "offload_optimizer": str(engine.zero_offload_optimizer()),
        "overlap_comm": engine.zero_overlap_comm(),
        "reduce_bucket_size": engine.zero_reduce_bucket_size(),
    }


def gather_state_dict(engine: Any, world: World) -> dict[str, Tensor]:
    """The module's fp32 weights on the main rank's CPU, whatever the ZeRO stage; called by all ranks together."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):  # no-op below stage 3
        if not world.is_main:
            return {}
        return {name: tensor.detach().cpu().clone() for name, tensor in engine.module.state_dict().items()}
