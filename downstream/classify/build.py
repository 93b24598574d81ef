"""Configuration -> moving average and evaluation of a classifier; checks of the labels."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from data.index import Index
from downstream.classify.config import FinetuneConfig
from downstream.classify.evaluate import evaluate, first_other
from downstream.classify.model import Classifier
from pretrain.average import Average, NoAverage
from pretrain.launch import World
from pretrain.loop import Evaluation, Run


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
            f"(head.classes={classes}): labels go from {index.label.min()} to {index.label.max()} (-1: none), "
            f"'{index.keys[first]}' has {index.label[first]}"
        )
    if index.classes and len(index.classes) != classes:
        raise ValueError(
            f"{key}: the classes of {index.root} are {len(index.classes)} ({index.classes[0]}, ...), "
            f"but head.classes={classes}"
        )


def check_classes(index: Index, val: Index) -> None:
    """Raises ValueError where the same label is one class in training and another in validation, by their names."""
    if other := first_other(index.classes, val.classes):
        label, trained, measured = other
        raise ValueError(
            f"label {label} is '{trained}' in data.shards ({index.root}) and '{measured}' in val.shards ({val.root}): "
            f"pack both with the same classes"
        )


def check_pairs(config: FinetuneConfig, world: World) -> None:
    """Raises ValueError where mixup or cutmix would leave an image without a partner."""
    micro = config.train.batch // (world.size * config.train.accumulation)
    if config.augment.mixes and micro % 2:
        raise ValueError(
            f"augment.mixup and cutmix mix pairs of images, and each of {world.size} ranks has {micro} at once "
            f"(train.batch={config.train.batch}, train.accumulation={config.train.accumulation}): make it even"
        )


def build_average(config: FinetuneConfig, classifier: Classifier, device: torch.device) -> Average | NoAverage:
    """Of a classifier that has not been partitioned yet."""
    if config.average is None:
        return NoAverage()
    momentum = config.average.momentum
    return Average(deepcopy(classifier).eval(), list(classifier.children()), momentum, momentum, device)


def build_evaluation(run: Run, config: FinetuneConfig, index: Index) -> Evaluation:
    """Top-1 and top-5 on the validation images, of the weights and of their moving average (`ema_*`)."""
    engine, average = run.engine, run.average

    def accuracy(model: Any) -> dict[str, float]:
        def predict(images: Tensor) -> Tensor:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
                logits: Tensor = model(images)["logits"]
            return logits

        return evaluate(
            predict,
            index,
            size=config.data.height_width,
            batch=config.val.batch,
            rank=run.world.rank,
            world=run.world.size,
            workers=config.data.workers,
            device=run.device,
        )

    @torch.no_grad()
    def measure() -> dict[str, float]:
        engine.eval()
        measured = accuracy(engine)
        engine.train()
        if average.target is not None:
            averaged = accuracy(average.target)
            measured |= {f"ema_{name}": averaged[name] for name in ("top1", "top5")}
        return measured

    return Evaluation(config.val.every * run.loader.steps_per_epoch, measure)
