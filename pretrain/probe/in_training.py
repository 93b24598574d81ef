"""Measures a run's encoder every few epochs, on a copy, so that training is the same without it."""

import copy

import torch

from data.cores import count_workers
from data.eval_loader import EvalLoader
from data.image_folder import load_samples
from pretrain.config import PretrainConfig
from pretrain.models.vit import ViT
from pretrain.probe.measure import Measured, check_sets, probe
from pretrain.trainer.launch import World

MAX_BATCH = 64  # images at once, as in downstream.classify.probe; fewer if the run's micro-batch is smaller


class Probe:
    """Measures the encoder of a run.

    Args:
        config: with its `probe` section.
        encoder: the one that will be trained; not partitioned yet.
        world, device: this rank, and the device that it computes on.

    Raises:
        ValueError: the sets cannot be used together; the message names both.
    """

    def __init__(self, config: PretrainConfig, encoder: ViT, world: World, device: torch.device):
        assert config.probe is not None
        train, val = (load_samples(path, config.data.cache) for path in (config.probe.train, config.probe.val))
        check_sets(train, val, config.probe.k)
        micro_batch = config.train.global_batch_size // (world.size * config.train.gradient_accumulation_steps)
        self.train, self.val = (
            EvalLoader(
                samples,
                size=config.data.height_width,
                batch=min(micro_batch, MAX_BATCH),
                rank=world.rank,
                world_size=world.size,
                num_workers=count_workers(config.data.num_workers),
                format=encoder.pixels.format,
            )
            for samples in (train, val)
        )
        self.settings = config.probe
        self.device = device
        self.copy = copy.deepcopy(encoder).eval()
        # In fp32 whatever the run's precision, for the same numbers as downstream.classify.probe.
        self.copy.residual_dtype = None

    @torch.no_grad()
    def measure(self, encoder: ViT) -> Measured:
        """`probe` of the encoder's current weights; called by all ranks together, in any ZeRO stage."""
        import deepspeed

        trained = list(encoder.parameters())
        with deepspeed.zero.GatheredParameters(trained):  # no-op below stage 3
            for copied, current in zip(self.copy.parameters(), trained, strict=True):
                copied.copy_(current)
        try:
            return probe(self.copy.to(self.device), self.train, self.val, self.settings, device=self.device)
        finally:
            self.copy.cpu()  # training needs the memory of the device
