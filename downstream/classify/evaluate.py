"""Accuracy of a classifier: `python -m downstream.classify.evaluate CHECKPOINT --data SHARDS_OR_FOLDER`.

Reports top-1, top-5, the mean of the per-class accuracies, and the expected calibration error. `--out FOLDER` writes
the accuracy of each class, the confusion matrix and a reliability diagram as tables and pictures. If images have lists
of labels, it reports the mean average precision, and that of each class. It also runs with torchrun, srun or
deepspeed, on any number of processes. Each image counts once; one that cannot be decoded counts as wrong. The last line
of the output is a JSON object.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from data.eval_loader import EvalLoader
from data.image_folder import Samples, load_samples
from data.labels import check_labels, check_same_classes
from data.multi_labels import MultiLabels
from data.pixel_format import RGB, PixelFormat
from downstream.classify.evaluation_cli import add_loading_options, run_on_ranks
from downstream.classify.evaluation_report import write_report
from downstream.classify.scores import NOTHING, MultiLabelPredictions, Predictions, predict_one_label
from downstream.classify.trained_classifier import TrainedClassifier, load_classifier
from downstream.own_images import count_images
from pretrain.trainer.launch import World
from pretrain.trainer.per_sample import compute_per_sample

Predict = Callable[[Tensor], Tensor]  # (B, H, W, channels) on the device -> logits (B, C)

COUNT_AS_WRONG = "count as wrong"
_ADVICE = "evaluate it on the data set that it was trained for"


def evaluate(
    predict: Predict,
    samples: Samples,
    *,
    size: tuple[int, int],
    batch: int,
    rank: int,
    world_size: int,
    num_workers: int,
    device: torch.device,
    format: PixelFormat = RGB,
) -> tuple[Predictions | MultiLabelPredictions, dict[str, int]]:
    """Predictions for all samples, each counted once. A collective: all ranks call it and get the same result.

    Args:
        predict: (B, H, W, channels) on the device -> logits (B, C). Every rank calls it equally often.
        samples: all of them labeled, with one class each or with lists of classes.
        size: (H, W) of the central crops.
        batch: images per batch of each rank.
        rank, world_size: this process's rank and the number of processes.
        num_workers: decoding processes of each rank.
        device: where `predict` computes.
        format: of the images; images of another format count as wrong.

    Returns:
        The predictions, and the numbers of `images` and of those `skipped`: undecodable images, which count as wrong
        and are listed on stderr.

    Raises:
        ValueError: samples without labels, or labels beyond the logits.
    """
    check_labels(samples)
    loader = EvalLoader(
        samples,
        size=size,
        batch=batch,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        format=format,
    )
    if samples.multi_labels is not None:
        return _evaluate_lists(predict, loader, samples.multi_labels, device)
    labels = torch.tensor(samples.label).long()
    num_classes = 0

    def compute(images: Tensor, indices: Tensor) -> Tensor:
        nonlocal num_classes
        logits = predict(images)
        num_classes = logits.shape[1]
        if labels.max() >= num_classes:
            raise ValueError(f"{samples.root} has label {labels.max()}, but the classifier has {num_classes} classes")
        return predict_one_label(logits, labels[indices].to(device))

    found, readable = compute_per_sample(compute, loader, device, "evaluating")
    hits, predicted, confidence = found[:, :2].long(), found[:, 2].long(), found[:, 3]
    predicted = torch.where(readable, predicted, NOTHING)
    counts = count_images(loader, readable, COUNT_AS_WRONG)
    return Predictions(labels, hits, predicted, confidence, num_classes), counts


def _evaluate_lists(
    predict: Predict, loader: EvalLoader, lists: MultiLabels, device: torch.device
) -> tuple[MultiLabelPredictions, dict[str, int]]:
    lowest = torch.finfo(torch.float32).min

    def compute(images: Tensor, _: Tensor) -> Tensor:
        logits = predict(images)
        return torch.where(torch.isfinite(logits), logits, lowest)

    scores, readable = compute_per_sample(compute, loader, device, "evaluating")
    scores[~readable] = lowest
    labels = torch.from_numpy(lists.rows(loader.indices, scores.shape[1])).bool()
    return MultiLabelPredictions(labels, scores), count_images(loader, readable, COUNT_AS_WRONG)


def check_classes(trained: TrainedClassifier, samples: Samples) -> None:
    """Raises ValueError if the classes of the data, or their number, differ from the classifier's."""
    if samples.classes and len(samples.classes) != trained.num_classes:
        raise ValueError(
            f"{trained.path} has {trained.num_classes} classes, {samples.root} has {len(samples.classes)}: {_ADVICE}"
        )
    check_same_classes(trained.class_names, str(trained.path), samples.classes, str(samples.root), _ADVICE)


def _command(options: argparse.Namespace, world: World, device: torch.device) -> dict[str, Any]:
    trained, samples = load_classifier(options.checkpoint, device), load_samples(options.data)
    check_classes(trained, samples)
    predictions, counts = evaluate(
        trained.predict,
        samples,
        size=trained.image_size,
        batch=options.batch_size,
        rank=world.rank,
        world_size=world.size,
        num_workers=options.num_workers,
        device=device,
        format=trained.pixels.format,
    )
    if options.out and world.is_main:
        write_report(options.out, predictions, trained.class_names or samples.classes)
    return {**predictions.summary(), **counts}


def main(arguments: list[str] | None = None) -> NoReturn:
    """Exits with 0 and one JSON line, or with 1 and one clear error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a classifier's model.safetensors, or its run's folder"
    )
    parser.add_argument(
        "--data", required=True, metavar="SHARDS_OR_FOLDER", help="shards, or a folder of class folders"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write per-class accuracy, confusion matrix and calibration here"
    )
    add_loading_options(parser)
    run_on_ranks(_command, parser.parse_args(arguments))


if __name__ == "__main__":
    main()
