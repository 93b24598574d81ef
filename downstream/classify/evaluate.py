"""Top-1 and top-5 of a classifier: `python -m downstream.classify.evaluate CHECKPOINT --data SHARDS_OR_FOLDER`.

Also with torchrun, srun or deepspeed, on any number of processes: each image counts once, and one that cannot be
decoded counts as wrong. The last line of the output is a JSON object.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from data.eval_loader import EvalLoader
from data.image_folder import Samples, load_samples
from data.labels import check_labels, check_same_classes
from downstream.classify.evaluation_cli import add_loading_options, run_on_ranks
from downstream.classify.trained_classifier import TrainedClassifier, load_classifier
from pretrain.trainer.accuracy import topk_hits
from pretrain.trainer.launch import World
from pretrain.trainer.per_sample import compute_per_sample, unreadable_keys

Predict = Callable[[Tensor], Tensor]  # uint8 (B, H, W, 3) on the device -> logits (B, C)

MAX_LISTED_KEYS = 20
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
) -> dict[str, float]:
    """Accuracy over all samples, each counted once; called by all ranks together, and the same on all of them.

    Args:
        predict: uint8 (B, H, W, 3) on the device -> logits (B, C). Every rank calls it equally often.
        samples: all of them labeled.
        size: (H, W) of the central crops.
        batch: images per batch of each rank.
        rank, world_size: this process and how many there are.
        num_workers: decoding processes of each rank.
        device: where `predict` computes.

    Returns:
        `top1` and `top5` as shares of all `images`, and how many of these were `skipped`: undecodable, therefore
        wrong, and listed on stderr.

    Raises:
        ValueError: samples without labels, or labels beyond the logits.
    """
    check_labels(samples)
    labels = torch.from_numpy(samples.label).long()

    def compute_hits(images: Tensor, indices: Tensor) -> Tensor:
        logits = predict(images)
        if labels.max() >= logits.shape[1]:
            raise ValueError(f"{samples.root} has label {labels.max()}, the classifier {logits.shape[1]} classes")
        return topk_hits(logits, labels[indices].to(device))

    loader = EvalLoader(samples, size=size, batch=batch, rank=rank, world_size=world_size, num_workers=num_workers)
    hits, readable = compute_per_sample(compute_hits, loader, device, "evaluating")
    top1, top5 = hits.sum(0).tolist()
    return {"top1": top1 / len(hits), "top5": top5 / len(hits), **count_images(loader, readable)}


def count_images(loader: EvalLoader, readable: Tensor) -> dict[str, int]:
    """How many images there are, and how many of them cannot be decoded; the main rank lists those on stderr.

    Args:
        loader: that the images came from.
        readable: bool (N,), whether each of its images could be decoded.
    """
    keys = unreadable_keys(loader, readable)
    if keys and loader.rank == 0:
        more = f" and {len(keys) - MAX_LISTED_KEYS} more" if len(keys) > MAX_LISTED_KEYS else ""
        print(
            f"{len(keys)} of {len(readable)} images cannot be decoded and count as wrong: "
            f"{', '.join(keys[:MAX_LISTED_KEYS])}{more}",
            file=sys.stderr,
        )
    return {"images": len(readable), "skipped": len(keys)}


def check_classes(trained: TrainedClassifier, samples: Samples) -> None:
    """Raises ValueError where the data has other classes than the classifier, or another number of them."""
    if samples.classes and len(samples.classes) != trained.num_classes:
        raise ValueError(
            f"{trained.path} has {trained.num_classes} classes, {samples.root} has {len(samples.classes)}: {_ADVICE}"
        )
    check_same_classes(trained.class_names, str(trained.path), samples.classes, str(samples.root), _ADVICE)


def _command(options: argparse.Namespace, world: World, device: torch.device) -> dict[str, Any]:
    trained, samples = load_classifier(options.checkpoint, device), load_samples(options.data)
    check_classes(trained, samples)
    return evaluate(
        trained.predict,
        samples,
        size=trained.image_size,
        batch=options.batch_size,
        rank=world.rank,
        world_size=world.size,
        num_workers=options.num_workers,
        device=device,
    )


def main(arguments: list[str] | None = None) -> NoReturn:
    """Exit code 0 and one JSON line, or 1 and one clear error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a classifier's model.safetensors, or its run's folder"
    )
    parser.add_argument(
        "--data", required=True, metavar="SHARDS_OR_FOLDER", help="shards, or a folder of class folders"
    )
    add_loading_options(parser)
    run_on_ranks(_command, parser.parse_args(arguments))


if __name__ == "__main__":
    main()
