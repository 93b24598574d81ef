"""Configuration -> moving average and evaluation of a classifier; checks of the labels."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from data.index import Index
from downstream.classify.config import FinetuneConfig
from downstream.classify.evaluate import evaluate, first_class_mismatch
from downstream.classify.model import Classifier
from pretrain.trainer.ema import EMA, NoEMA
from pretrain.trainer.launch import World
from pretrain.trainer.loop import Evaluation


def check_labels(index: Index, classes: int, key: str) -> None:
    """Refuses samples without a label, or with one that is no class.

    Args:
        key: of the configuration that names the shards.

    Raises:
        ValueError: says how many, which labels there are, and one of the samples.
    """
    bad = (index.label < 0) | (index.label >= classes)
    if bad.any():
        first = int(bad.argmax())
        raise ValueError(
            f"{key}: {int(bad.sum())} of {len(index)} samples in {index.root} have no label in 0..{classes - 1} "
            f"(head.num_classes={classes}): labels go from {index.label.min()} to {index.label.max()} (-1: none), "
            f"'{index.keys[first]}' has {index.label[first]}"
        )
    if index.classes and len(index.classes) != classes:
        raise ValueError(
            f"{key}: the classes of {index.root} are {len(index.classes)} ({index.classes[0]}, ...), "
            f"but head.num_classes={classes}"
        )


def check_classes(index: Index, val: Index) -> None:
    """Raises ValueError where the same label is one class in training and another in validation, by their names."""
    if other := first_class_mismatch(index.classes, val.classes):
        label, trained, measured = other
        raise ValueError(
            f"label {label} is '{trained}' in data.shards ({index.root}) and '{measured}' in val.shards ({val.root}): "
            f"pack both with the same classes"
        )


def check_pairs(config: FinetuneConfig, world: World) -> None:
    """Raises ValueError where mixup or cutmix would leave an image without a partner."""
    micro = config.train.global_batch_size // (world.size * config.train.gradient_accumulation_steps)
    if config.augment.mixes and micro % 2:
        raise ValueError(
            f"augment.mixup and cutmix mix pairs of images, and each of {world.size} ranks has {micro} at once "
            f"(train.global_batch_size={config.train.global_batch_size}, train.gradient_accumulation_steps={config.train.gradient_accumulation_steps}): make it even"
        )


def build_ema(config: FinetuneConfig, classifier: Classifier, device: torch.device) -> NoEMA:
    """Of a classifier that has not been partitioned yet."""
    if config.ema is None:
        return NoEMA()
    return EMA(deepcopy(classifier).eval(), list(classifier.children()), config.ema.decay, config.ema.decay, device)


def build_evaluation(config: FinetuneConfig, index: Index, world: World, device: torch.device) -> Evaluation:
    """Top-1 and top-5 on the validation images, of the weights and of their moving average (`ema_*`)."""

    def accuracy(model: Any) -> dict[str, float]:
        def predict(images: Tensor) -> Tensor:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
                logits: Tensor = model(images)["logits"]
            return logits

        return evaluate(
            predict,
            index,
            size=config.data.height_width,
            batch=config.val.batch_size,
            rank=world.rank,
            world_size=world.size,
            num_workers=config.data.num_workers,
            device=device,
        )

    @torch.no_grad()
    def measure(engine: Any, ema: NoEMA) -> dict[str, float]:
        engine.eval()
        measured = accuracy(engine)
        engine.train()
        if ema.model is not None:
            averaged = accuracy(ema.model)
            measured |= {f"ema_{name}": averaged[name] for name in ("top1", "top5")}
        return measured

    return Evaluation(config.val.every_epochs, measure)
