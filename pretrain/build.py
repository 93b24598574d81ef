"""Builds the method, its teacher and the evaluation of a configuration."""

import torch

from pretrain.config import PretrainConfig
from pretrain.methods import METHODS
from pretrain.methods.base import LUTMethod, Method
from pretrain.methods.lut import LUT, Teacher
from pretrain.methods.targets import build_target
from pretrain.models.vit import ViT
from pretrain.probe import Probe
from pretrain.trainer.ema import NoEMA
from pretrain.trainer.launch import World
from pretrain.trainer.loop import Evaluation


def build_method(config: PretrainConfig) -> Method | LUT:
    """The method, initialized from the seed alone: the same weights on every rank."""
    torch.manual_seed(config.seed)
    model = config.model
    encoder = ViT(
        model.arch,
        model.patch_size,
        config.grid,
        model.position == "relative",
        model.grad_checkpointing,
        drop_path_rate=model.drop_path_rate,
        shared_bias=model.position == "bias",
        learned=model.position == "learned",
        registers=model.registers,
        layer_scale=model.layer_scale,
    )
    target = build_target(config.target, encoder.grid, encoder.patch_size)
    method = METHODS[config.method.name](config.method, encoder, target, config.pr_mim)
    if config.lut is None:
        return method
    assert isinstance(method, LUTMethod)
    return LUT(config.lut, method)


def build_ema(config: PretrainConfig, method: Method | LUT, device: torch.device) -> NoEMA:
    """The teacher, if the method has one; the method is not partitioned yet."""
    if isinstance(method, LUT):
        return Teacher(method, device, bf16=config.train.precision == "bf16")
    return NoEMA()


def build_evaluation(
    config: PretrainConfig, method: Method | LUT, world: World, device: torch.device
) -> Evaluation | None:
    """The probe, if there is one; the method is not partitioned yet."""
    if config.probe is None:
        return None
    probe = Probe(config, method.encoder, world, device)
    return Evaluation(config.probe.every_epochs, lambda engine, ema: probe.measure(engine.module.encoder))
