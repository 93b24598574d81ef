"""Builds a classifier's moving average and evaluation from its configuration."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from data.cores import count_workers
from data.image_folder import Samples
from downstream.classify.config import FinetuneConfig
from downstream.classify.evaluate import evaluate
from downstream.classify.model import Classifier
from pretrain.trainer.ema import EMA, NoEMA
from pretrain.trainer.launch import World
from pretrain.trainer.loop import Evaluation


def build_ema(config: FinetuneConfig, classifier: Classifier, device: torch.device) -> NoEMA:
    """The moving average of a classifier that has not been partitioned yet."""
    if config.ema is None:
        return NoEMA()
    return EMA(deepcopy(classifier).eval(), list(classifier.children()), config.ema.decay, config.ema.decay, device)


def build_evaluation(config: FinetuneConfig, samples: Samples, world: World, device: torch.device) -> Evaluation:
    """Validation accuracy (mAP for lists of labels) of the weights and of their moving average (`ema_*`).

    Args:
        config: the run's.
        samples: the validation images.
        world, device: this rank's position and device.
    """

    def accuracy(model: nn.Module) -> dict[str, float]:
        def predict(images: Tensor) -> Tensor:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
                logits: Tensor = model(images)["logits"]
            return logits

        predictions, counts = evaluate(
            predict,
            samples,
            size=config.data.height_width,
            batch=config.val.batch_size,
            rank=world.rank,
            world_size=world.size,
            num_workers=count_workers(config.data.num_workers),
            device=device,
            format=config.data.pixels.format,
        )
        return {**predictions.summary(), **counts}

    @torch.no_grad()
    def measure(engine: Any, ema: NoEMA) -> dict[str, float]:
        engine.eval()
        measured = accuracy(engine)
        engine.train()
        if ema.model is not None:
            averaged = accuracy(ema.model)
            measured |= {f"ema_{name}": averaged[name] for name in ("top1", "top5", "map") if name in averaged}
        return measured

    return Evaluation(config.val.every_epochs, measure)
