"""Configuration -> moving average and evaluation of a classifier; checks of the labels."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from data.index import Index
from data.labels import check_labels, check_same_classes
from downstream.classify.config import FinetuneConfig
from downstream.classify.evaluate import evaluate
from downstream.classify.model import Classifier
from pretrain.trainer.ema import EMA, NoEMA
from pretrain.trainer.launch import World
from pretrain.trainer.loop import Evaluation


def check_train_and_val(index: Index, val: Index, num_classes: int) -> None:
    """Checks that both sets of shards have labels of the same `num_classes` classes.

    Raises:
        ValueError: samples without a label, or with one that is not a class; another number of classes; or a label
            that is one class in training and another in validation, by their names.
    """
    for key, samples in {"data.shards": index, "val.shards": val}.items():
        try:
            check_labels(samples, num_classes, "head.num_classes")
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        if samples.classes and len(samples.classes) != num_classes:
            raise ValueError(
                f"{key}: {samples.root} has {len(samples.classes)} classes ({samples.classes[0]}, ...), "
                f"but head.num_classes={num_classes}"
            )
    where, val_where = f"data.shards ({index.root})", f"val.shards ({val.root})"
    check_same_classes(index.classes, where, val.classes, val_where, "pack both with the same classes")


def check_mixing(config: FinetuneConfig, world: World) -> None:
    """Raises ValueError where mixup or cutmix would leave an image without a partner."""
    train = config.train
    micro = train.global_batch_size // (world.size * train.gradient_accumulation_steps)
    if config.augment.mixes and micro % 2:
        raise ValueError(
            f"augment.mixup and augment.cutmix mix pairs of images, but each of {world.size} ranks has {micro} at once "
            f"(train.global_batch_size={train.global_batch_size}, "
            f"train.gradient_accumulation_steps={train.gradient_accumulation_steps}): make it even"
        )


def build_ema(config: FinetuneConfig, classifier: Classifier, device: torch.device) -> NoEMA:
    """The moving average of a classifier that has not been partitioned yet."""
    if config.ema is None:
        return NoEMA()
    return EMA(deepcopy(classifier).eval(), list(classifier.children()), config.ema.decay, config.ema.decay, device)


def build_evaluation(config: FinetuneConfig, index: Index, world: World, device: torch.device) -> Evaluation:
    """Top-1 and top-5 on the validation images, of the weights and of their moving average (`ema_*`).

    Args:
        config: the run's.
        index: of the validation images.
        world, device: where this rank is, and computes.
    """

    def accuracy(model: nn.Module) -> dict[str, float]:
        def predict(images: Tensor) -> Tensor:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
                logits: Tensor = model(images)["logits"]
            return logits

        predictions, counts = evaluate(
            predict,
            index,
            size=config.data.height_width,
            batch=config.val.batch_size,
            rank=world.rank,
            world_size=world.size,
            num_workers=config.data.num_workers,
            device=device,
        )
        return {**predictions.summary(), **counts}

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
