"""Builds the method, its teacher and its evaluation from a configuration."""

import copy

import torch

from pretrain.config import PretrainConfig
from pretrain.methods import METHODS
from pretrain.methods.base import LUTMethod, Method
from pretrain.methods.lut import LUT, Teacher
from pretrain.methods.targets import build_target
from pretrain.methods.targets.features import EMAConfig, EncoderTeacher, FeatureTarget, FeatureTeacher, TeacherConfig
from pretrain.models.vit import ViT
from pretrain.probe.in_training import Probe
from pretrain.trainer.ema import EMA, NoEMA
from pretrain.trainer.launch import World
from pretrain.trainer.loop import Evaluation


def build_method(config: PretrainConfig, teacher: FeatureTeacher | None = None) -> Method | LUT:
    """The method, initialized from the seed alone: the same weights on every rank.

    Args:
        teacher: for `target.name=teacher`, the frozen teacher, which `downstream` reads. For `target.name=ema`, a copy
            of the encoder unless one is given.
    """
    encoder = _build_encoder(config)
    if isinstance(config.target, EMAConfig) and teacher is None:
        teacher = EncoderTeacher(copy.deepcopy(encoder))
    target = build_target(config.target, encoder.grid, encoder.patch_size, teacher, encoder.pixels)
    method = METHODS[config.method.name](config.method, encoder, target, config.pr_mim)
    if config.lut is None:
        return method
    assert isinstance(method, LUTMethod)
    return LUT(config.lut, method)


def _build_encoder(config: PretrainConfig) -> ViT:
    torch.manual_seed(config.seed)
    model = config.model
    return ViT(
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
        pixels=config.data.pixels,
    )


def untrained_teacher(config: PretrainConfig) -> FeatureTeacher | None:
    """A stand-in for the frozen teacher, if there is one, where only costs matter: an encoder like the run's."""
    return EncoderTeacher(_build_encoder(config)) if isinstance(config.target, TeacherConfig) else None


def feature_teacher(method: Method | LUT) -> FeatureTeacher | None:
    """The teacher whose features a method predicts, if it predicts any."""
    target = (method.method if isinstance(method, LUT) else method).target
    return target.teacher if isinstance(target, FeatureTarget) else None


def build_ema(config: PretrainConfig, method: Method | LUT, device: torch.device) -> NoEMA:
    """The moving average that the method learns from, if any; called before the method is partitioned."""
    if isinstance(method, LUT):
        return Teacher(method, device, bf16=config.train.precision == "bf16")
    if isinstance(config.target, EMAConfig):
        teacher = feature_teacher(method)
        assert isinstance(teacher, EncoderTeacher)
        teacher.encoder.load_state_dict(method.encoder.state_dict())  # may have been loaded since the copy was made
        return EMA(teacher, [method.encoder], config.target.momentum, config.target.final_momentum, device)
    return NoEMA()


def build_evaluation(
    config: PretrainConfig, method: Method | LUT, world: World, device: torch.device
) -> Evaluation | None:
    """The probe, if there is one; called before the method is partitioned."""
    if config.probe is None:
        return None
    probe = Probe(config, method.encoder, world, device)
    return Evaluation(config.probe.every_epochs, lambda engine, ema: probe.measure(engine.module.encoder))
