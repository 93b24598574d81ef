"""Predicts the classes of images: `python -m downstream.classify.predict MODEL IMAGES [--out predictions.csv]`.

MODEL is a classifier's file, or the folder of its run. IMAGES is an image, a folder of images with any nesting, or
shards; labels are not needed. The most probable classes of each image and their probabilities are printed, or written
to a CSV file with the columns key, class_1, probability_1, class_2 and so on; the row of an image that cannot be
decoded is empty. A classifier trained on lists of labels gives every class a probability of its own; classes below 0.5
are left out. It also runs with torchrun, srun or deepspeed, on any number of processes. The last line of the output is
a JSON object.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from timm.data import ImageNetInfo
from torch import Tensor

from data.eval_loader import EvalLoader
from downstream.classify.evaluation_cli import add_loading_options, build_loader, run_on_ranks
from downstream.classify.trained_classifier import TrainedClassifier, load_classifier
from downstream.own_images import count_images, load_images, sample_name, write_csv
from pretrain.trainer.launch import World
from pretrain.trainer.per_sample import compute_per_sample


def most_probable(
    trained: TrainedClassifier, loader: EvalLoader, top: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The most probable classes of N images. A collective: all ranks call it and get the same result.

    Args:
        trained: on the device.
        loader: the images.
        top: how many classes; all of them if there are fewer.
        device: where to compute.

    Returns:
        The probabilities, float64 (N, K), descending; the classes, int64 (N, K); and bool (N,), whether the image can
        be decoded. The values of other images mean nothing.
    """
    top = min(top, trained.num_classes)

    def compute(images: Tensor, _: Tensor) -> Tensor:
        logits = trained.predict(images).double()
        probability, label = (logits.sigmoid() if trained.multi_label else logits.softmax(1)).topk(top)
        return torch.cat([probability, label.double()], dim=1)

    found, readable = compute_per_sample(compute, loader, device, "predicting")
    return found[:, :top], found[:, top:].long(), readable


def name_classes(trained: TrainedClassifier) -> list[str]:
    """The classes' names, or else their labels; ImageNet's WordNet ids as `Egyptian cat (n02124075)`."""
    names = list(trained.class_names) or [str(label) for label in range(trained.num_classes)]
    if not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return names
    wordnet = ImageNetInfo("imagenet-22k")
    if not set(names) <= set(wordnet.label_names()):
        return names
    return [f"{wordnet.label_name_to_description(name).split(',')[0]} ({name})" for name in names]


def named_rows(
    loader: EvalLoader,
    names: Sequence[str],
    predictions: tuple[Tensor, Tensor, Tensor],
    threshold: float,
) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """Each image's name, and its classes with at least `threshold` as (name, probability), the most probable first."""
    for sample, shares, labels, readable in zip(
        loader.indices.tolist(), *(tensor.tolist() for tensor in predictions), strict=True
    ):
        pairs = [(names[label], share) for share, label in zip(shares, labels, strict=True) if share >= threshold]
        yield sample_name(loader.samples, sample), pairs if readable else []


def _cells(name: str, pairs: list[tuple[str, float]], places: int) -> list[str]:
    cells = [cell for label, share in pairs for cell in (label, f"{share:.6f}")]
    return [name, *cells, *[""] * (2 * places - len(cells))]


def _command(options: argparse.Namespace, world: World, device: torch.device) -> dict[str, Any]:
    if options.top < 1 or not 0 <= (options.threshold or 0) <= 1:
        raise ValueError(f"--top {options.top} must be at least 1, and --threshold {options.threshold} between 0 and 1")
    samples = load_images(options.images)
    trained = load_classifier(options.model, device)
    loader = build_loader(samples, trained.image_size, options, world, trained.pixels.format)
    predictions = most_probable(trained, loader, options.top, device)
    counts = count_images(loader, predictions[-1], "have no prediction")
    if not world.is_main:
        return {}
    default = 0.5 if trained.multi_label else 0.0
    threshold = default if options.threshold is None else options.threshold
    rows = named_rows(loader, name_classes(trained), predictions, threshold)
    if options.out is None:
        for name, pairs in rows:
            print(f"{name}: {', '.join(f'{label} {share:.1%}' for label, share in pairs) or '-'}")
        return counts
    options.out.parent.mkdir(parents=True, exist_ok=True)
    places = predictions[0].shape[1]
    columns = [f"{column}_{place}" for place in range(1, places + 1) for column in ("class", "probability")]
    write_csv(options.out, ("key", *columns), (_cells(name, pairs, places) for name, pairs in rows))
    return {**counts, "out": str(options.out)}


def main(arguments: list[str] | None = None) -> NoReturn:
    """Exits with 0 and one JSON line, or with 1 and one clear error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("images", metavar="IMAGES")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes for each image; default: 5")
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help="leave out classes that are less probable; default: 0, or 0.5 if an image can have several classes",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="write a table instead of printing")
    add_loading_options(parser)
    run_on_ranks(_command, parser.parse_args(arguments))


if __name__ == "__main__":
    main()
