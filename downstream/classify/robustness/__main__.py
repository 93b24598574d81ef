"""Robustness of an ImageNet classifier: `python -m downstream.classify.robustness CHECKPOINT --on v2=PATH a=PATH ...`.

PATH is a folder in the published layout, or its shards:

    val, real, occlusion             ImageNet's validation set, folders named by WordNet id; real needs its file names
    v2                               folders 0 to 999
    a, r, sketch                     folders named by WordNet id; A and R are limited to their own 200 classes
    c                                corruption/severity/WordNet id, 15 x 5 of them
    o                                folders named by WordNet id; limited to its 200 classes; needs val=PATH as well
    objectnet                        its 313 folders, or at least the 113 in ImageNet's classes; borders are cut off
    si_size, si_location, si_rotation    SI-Score's folders of 61 classes

It also runs with torchrun, srun or deepspeed, on any number of processes. It prints a table, then a JSON object as the
last line.
"""

import argparse
import re
from typing import Any, NoReturn

import torch

from data.labels import check_same_classes
from data.pixel_format import RGB
from downstream.classify.evaluation_cli import add_loading_options, run_on_ranks
from downstream.classify.robustness.datasets import NUM_CLASSES, synsets
from downstream.classify.robustness.evaluator import SETS, Evaluator, prepare
from downstream.classify.trained_classifier import TrainedClassifier, load_classifier
from pretrain.trainer.launch import World

_WORDNET_ID = re.compile(r"n\d{8}")


def parse_paths(pairs: list[str]) -> dict[str, str]:
    """['v2=/data/v2'] -> {'v2': '/data/v2'}; raises ValueError if a pair has no known set or no path."""
    paths = dict(pair.partition("=")[::2] for pair in pairs)
    for name, path in paths.items():
        if name not in SETS or not path:
            raise ValueError(f"--on {name}={path}: give set=PATH, where set is one of {', '.join(SETS)}")
    return paths


def check_classifier(trained: TrainedClassifier) -> None:
    """Raises ValueError unless images are RGB and classes ImageNet's; compares only names that are all WordNet ids."""
    if trained.pixels.format != RGB:
        raise ValueError(f"{trained.path} was trained on {trained.pixels.format}; these sets contain 8-bit RGB images")
    if trained.num_classes != NUM_CLASSES:
        raise ValueError(
            f"{trained.path} has {trained.num_classes} classes; these sets are for ImageNet's {NUM_CLASSES}"
        )
    if all(_WORDNET_ID.fullmatch(name) for name in trained.class_names):
        check_same_classes(
            trained.class_names, str(trained.path), list(synsets()), "ImageNet", "these sets are for ImageNet's classes"
        )


def _command(options: argparse.Namespace, world: World, device: torch.device) -> dict[str, Any]:
    paths = parse_paths(options.on)
    trained = load_classifier(options.checkpoint, device)
    check_classifier(trained)
    prepared = {name: prepare(name, paths) for name in paths}  # checks all sets before evaluating the first
    evaluator = Evaluator(trained.predict, trained.image_size, options.batch_size, options.num_workers, world, device)
    results = {}
    for name, measure in prepared.items():
        results[name] = measure(evaluator)
        if world.is_main:
            print(_table_row(name, results[name]), flush=True)
    return results


def _table_row(name: str, result: dict[str, float]) -> str:
    metric = next(iter(result))
    counts = f"{result['images']:8.0f} images, {result['skipped']:.0f} undecodable"
    return f"{name:12} {metric:5} {100 * result[metric]:6.2f} %  {counts}"


def main(arguments: list[str] | None = None) -> NoReturn:
    """Exits with 0, a table and one JSON line, or with 1 and one clear error."""
    parser = argparse.ArgumentParser(
        "python -m downstream.classify.robustness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a classifier's model.safetensors, or its run's folder"
    )
    parser.add_argument("--on", required=True, nargs="+", metavar="SET=PATH")
    add_loading_options(parser)
    run_on_ranks(_command, parser.parse_args(arguments))


if __name__ == "__main__":
    main()
