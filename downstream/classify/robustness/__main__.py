"""Robustness of an ImageNet classifier: `python -m downstream.classify.robustness CHECKPOINT --on v2=PATH a=PATH ...`.

PATH is a folder in the published layout, or its shards:

    val, real, occlusion             ImageNet's validation set, folders named by WordNet id; real needs its file names
    v2                               folders 0 to 999
    a, r, sketch                     folders named by WordNet id; of A and R only their 200 classes are candidates
    c                                corruption/severity/WordNet id, 15 x 5 of them
    o                                folders named by WordNet id; needs val=PATH as well
    objectnet                        its 313 folders, or at least the 113 that are ImageNet's; borders are cut off
    si_size, si_location, si_rotation    SI-Score's folders of 61 classes

Also by torchrun, srun or deepspeed, on any number of processes. A table, then a JSON object as the last line.
"""

import argparse
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from data.eval_loader import EvalLoader
from data.image_folder import Samples, load_samples
from downstream.classify.evaluate import Predict, TrainedClassifier, count_images, first_class_mismatch, load_classifier
from downstream.classify.evaluation_cli import Place, add_loading_options, run_on_ranks
from downstream.classify.robustness.layouts import (
    ALEXNET,
    CLASSES,
    SEVERITIES,
    ClassMap,
    check_folders,
    imagenet,
    numbered,
    objectnet,
    right_by_real,
    right_classes,
    si_score,
    synsets,
)
from downstream.classify.robustness.metrics import aupr, confidence, hits, mean_corruption_error, occlude
from pretrain.trainer.per_sample import compute_per_sample

BORDER = 2  # red pixels around ObjectNet's images
OUTLIER_CLASSES = 200  # of ImageNet-O
_WORDNET_ID = re.compile(r"n\d{8}")
# Corruptions beyond the 15 of the mCE, which are published with them.
EXTRA = {"speckle_noise", "gaussian_blur", "spatter", "saturate"}


@dataclass(frozen=True)
class Evaluator:
    """A classifier and how to go through images; `measure` and `confidences` are called by all ranks together."""

    predict: Predict
    size: tuple[int, int]
    batch: int
    workers: int
    place: Place

    def measure(
        self, name: str, samples: Samples, right: Tensor, among: Tensor | None = None, border: int = 0
    ) -> dict[str, float]:
        """Top-1 over the samples for which any class is right."""
        once = self._once(samples, right.any(1), border)

        def compute(images: Tensor, numbers: Tensor) -> Tensor:
            return hits(self.predict(images), right[numbers].to(images.device), among)

        rows, readable = compute_per_sample(compute, once, self.place[1], name)
        return {"top1": rows.sum().item() / len(rows), **count_images(once, readable)}

    def confidences(
        self, name: str, samples: Samples, wanted: Tensor, among: Tensor
    ) -> tuple[Tensor, EvalLoader, Tensor]:
        """The confidence of each wanted sample, the pass, and which images could be decoded."""
        once = self._once(samples, wanted, 0)
        rows, readable = compute_per_sample(
            lambda images, _: confidence(self.predict(images), among)[:, None], once, self.place[1], name
        )
        return rows[:, 0], once, readable

    def _once(self, samples: Samples, wanted: Tensor, border: int) -> EvalLoader:
        world = self.place[0]
        return EvalLoader(
            samples,
            size=self.size,
            batch=self.batch,
            rank=world.rank,
            world_size=world.size,
            num_workers=self.workers,
            subset=np.flatnonzero(wanted.numpy()),
            border=border,
        )


Measure = Callable[[Evaluator], dict[str, float]]


def _prepare(name: str, paths: dict[str, str]) -> Measure:
    """Reads and checks a set's listing; what is returned evaluates it."""
    path = paths[name]
    if name == "c":
        return _prepare_c(Path(path))
    if name == "objectnet" and (Path(path) / "images").is_dir():
        path = str(Path(path) / "images")
    samples = load_samples(path)
    if name == "o":
        return _prepare_o(samples, paths)
    if name == "real":
        right = right_by_real(samples)
    elif name == "objectnet":
        classes = objectnet()
        right = right_classes(samples, classes, [folder for folder, numbers in classes.items() if numbers])
    else:
        right = right_classes(samples, _CLASSES[name]())
    if name == "occlusion":
        return lambda evaluator: _occluded(evaluator).measure(name, samples, right)
    among = torch.tensor(sorted(number for (number,) in imagenet(name).values())) if name in ("a", "r") else None
    border = BORDER if name == "objectnet" else 0
    return lambda evaluator: evaluator.measure(name, samples, right, among, border)


_CLASSES: dict[str, Callable[[], ClassMap]] = {
    "val": imagenet,
    "occlusion": imagenet,
    "v2": numbered,
    "a": functools.partial(imagenet, "a"),
    "r": functools.partial(imagenet, "r"),
    "sketch": imagenet,
    **dict.fromkeys(("si_size", "si_location", "si_rotation"), si_score),
}
SETS = (*_CLASSES, "real", "c", "o", "objectnet")


def _occluded(evaluator: Evaluator) -> Evaluator:
    size, batch, workers, place = evaluator.size, evaluator.batch, evaluator.workers, evaluator.place
    return Evaluator(lambda images: evaluator.predict(occlude(images)), size, batch, workers, place)


def _prepare_c(root: Path) -> Measure:
    folders = [folder.name for folder in root.iterdir() if folder.is_dir()]
    check_folders(set(folders) - EXTRA, dict.fromkeys(ALEXNET, ()), root)
    for corruption in ALEXNET:
        for severity in SEVERITIES:
            folder = root / corruption / severity
            if not folder.is_dir():
                raise ValueError(
                    f"{root}: has no {corruption}/{severity}; ImageNet-C has 15 corruptions of 5 severities"
                )

    def measure(evaluator: Evaluator) -> dict[str, float]:
        errors: dict[str, list[float]] = {}
        images = skipped = 0.0
        for corruption in ALEXNET:
            for severity in SEVERITIES:
                samples = load_samples(root / corruption / severity)
                right = right_classes(samples, imagenet())
                found = evaluator.measure(f"c: {corruption} {severity}", samples, right)
                errors.setdefault(corruption, []).append(1 - found["top1"])
                images, skipped = images + found["images"], skipped + found["skipped"]
        return {**mean_corruption_error(errors), "images": images, "skipped": skipped}

    return measure


def _prepare_o(samples: Samples, paths: dict[str, str]) -> Measure:
    """Inliers are the images of the validation set's same 200 classes, which are the only candidates."""
    if "val" not in paths:
        raise ValueError("o=PATH compares with ImageNet's validation set: give val=PATH as well")
    own = right_classes(samples, imagenet(), needed=())
    among = own.any(0).nonzero()[:, 0]
    if len(among) != OUTLIER_CLASSES:
        raise ValueError(
            f"{samples.root}: has {len(among)} classes, ImageNet-O has {OUTLIER_CLASSES}: unpack all of it"
        )
    val = load_samples(paths["val"])
    inlying = right_classes(val, imagenet())[:, among].any(1)

    def measure(evaluator: Evaluator) -> dict[str, float]:
        found = [
            evaluator.confidences("o", samples, torch.ones(len(samples), dtype=torch.bool), among),
            evaluator.confidences("o: val", val, inlying, among),
        ]
        counts = [count_images(once, readable) for _, once, readable in found]
        # What cannot be decoded, or has logits that are not finite, counts as badly as can be.
        (outliers, _, readable), (inliers, _, _) = found
        outliers = torch.where(readable, outliers, 1.0).nan_to_num(1.0)
        return {
            "aupr": aupr(-outliers, -inliers.nan_to_num(0.0)),
            **{key: counts[0][key] + counts[1][key] for key in counts[0]},
        }

    return measure


def _parse(pairs: list[str]) -> dict[str, str]:
    paths = dict(pair.partition("=")[::2] for pair in pairs)
    for name, path in paths.items():
        if name not in SETS or not path:
            raise ValueError(f"--on {name}={path}: give set=PATH, where set is one of {', '.join(SETS)}")
    return paths


def check_classifier(trained: TrainedClassifier) -> None:
    """Raises ValueError where the classes are not ImageNet's; names that are no WordNet ids say nothing."""
    if trained.classes != CLASSES:
        raise ValueError(
            f"{trained.path} tells {trained.classes} classes apart; these sets are for ImageNet's {CLASSES}"
        )
    by_wordnet = all(_WORDNET_ID.fullmatch(name) for name in trained.names)
    if by_wordnet and (other := first_class_mismatch(trained.names, list(synsets()))):
        label, ours, theirs = other
        raise ValueError(
            f"label {label} is '{ours}' to {trained.path} and '{theirs}' in ImageNet, which these sets are for"
        )


def _command(options: argparse.Namespace, place: Place) -> dict[str, Any]:
    paths = _parse(options.on)
    trained = load_classifier(options.checkpoint, place[1])
    check_classifier(trained)
    prepared = {name: _prepare(name, paths) for name in paths}  # all are checked before the first is evaluated
    evaluator = Evaluator(trained.predict, trained.size, options.batch, options.workers, place)
    results = {}
    for name, measure in prepared.items():
        results[name] = measure(evaluator)
        if place[0].is_main:
            print(_line(name, results[name]), flush=True)
    return results


def _line(name: str, result: dict[str, float]) -> str:
    metric = next(iter(result))
    counted = f"{result['images']:8.0f} images, {result['skipped']:.0f} undecodable"
    return f"{name:12} {metric:5} {100 * result[metric]:6.2f} %  {counted}"


def main(arguments: list[str] | None = None) -> NoReturn:
    """Exit code 0, a table and one JSON line, or 1 and one clear error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a classifier's model.safetensors")
    parser.add_argument("--on", required=True, nargs="+", metavar="SET=PATH")
    add_loading_options(parser)
    run_on_ranks(functools.partial(_command, parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
