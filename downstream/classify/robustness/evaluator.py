"""Evaluates a classifier on the robustness sets: `prepare` checks a set's listing, an `Evaluator` evaluates on it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.eval_loader import EvalLoader
from data.image_folder import Samples, load_samples
from downstream.classify.evaluate import COUNT_AS_WRONG, Predict
from downstream.classify.robustness.datasets import (
    ALEXNET_ERRORS,
    CLASS_MAPS,
    EXTRA_CORRUPTIONS,
    OBJECTNET_BORDER,
    OUTLIER_CLASSES,
    SEVERITIES,
    check_folders,
    imagenet,
    objectnet,
    right_by_real,
    right_classes,
)
from downstream.classify.robustness.metrics import confidence, mean_corruption_error, occlude, top1_hits
from downstream.classify.scores import average_precision
from downstream.own_images import count_images
from pretrain.trainer.launch import World
from pretrain.trainer.per_sample import compute_per_sample

SETS = (*CLASS_MAPS, "real", "c", "o", "objectnet")


class Confidences(NamedTuple):
    """A classifier's confidence for each of N samples."""

    values: Tensor  # float64 (N,)
    readable: Tensor  # bool (N,), whether the image could be decoded
    loader: EvalLoader  # the source of the images


@dataclass(frozen=True)
class Evaluator:
    """A classifier and how to feed it; all ranks must call `top1` and `confidences`.

    Attributes:
        predict: uint8 (B, H, W, 3) on the device -> logits (B, 1000).
        size: (H, W) of the central crops.
        batch: images per batch of each rank.
        workers: decoding processes of each rank.
        world, device: this rank's position and device.
    """

    predict: Predict
    size: tuple[int, int]
    batch: int
    workers: int
    world: World
    device: torch.device

    def top1(
        self, name: str, samples: Samples, right: Tensor, candidates: Tensor | None = None, border: int = 0
    ) -> dict[str, float]:
        """`top1` over the samples that have a correct class, and the numbers of these `images` and of those `skipped`.

        Args:
            name: label of the progress bar.
            samples: N.
            right: bool (N, 1000), the correct classes of each sample.
            candidates: the classes to choose from; by default, all.
            border: pixels to cut off on each side first.
        """
        loader = self._loader(samples, right.any(1), border)

        def compute(images: Tensor, indices: Tensor) -> Tensor:
            return top1_hits(self.predict(images), right[indices].to(images.device), candidates)

        hits, readable = compute_per_sample(compute, loader, self.device, name)
        return {"top1": hits.sum().item() / len(hits), **count_images(loader, readable, COUNT_AS_WRONG)}

    def confidences(self, name: str, samples: Samples, selected: Tensor, candidates: Tensor) -> Confidences:
        """The classifier's confidence for the selected samples, choosing only from the candidate classes.

        Args:
            name: label of the progress bar.
            samples: N.
            selected: bool (N,).
            candidates: the classes to choose from.
        """
        loader = self._loader(samples, selected)
        values, readable = compute_per_sample(
            lambda images, _: confidence(self.predict(images), candidates)[:, None], loader, self.device, name
        )
        return Confidences(values[:, 0], readable, loader)

    def _loader(self, samples: Samples, selected: Tensor, border: int = 0) -> EvalLoader:
        return EvalLoader(
            samples,
            size=self.size,
            batch=self.batch,
            rank=self.world.rank,
            world_size=self.world.size,
            num_workers=self.workers,
            subset=np.flatnonzero(selected.numpy()),
            border=border,
        )


Measure = Callable[[Evaluator], dict[str, float]]


def prepare(name: str, paths: dict[str, str]) -> Measure:
    """Reads and checks a set's listing, and returns a function that evaluates on the set.

    Args:
        name: one of `SETS`.
        paths: of all sets to evaluate on.

    Raises:
        ValueError: the folder or shards are not this set; the message says what is missing or unexpected.
    """
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
        right = right_classes(samples, classes, [folder for folder, labels in classes.items() if labels])
    else:
        right = right_classes(samples, CLASS_MAPS[name]())
    if name == "occlusion":
        return lambda evaluator: _with_occlusion(evaluator).top1(name, samples, right)
    candidates = torch.tensor(sorted(label for (label,) in imagenet(name).values())) if name in ("a", "r") else None
    border = OBJECTNET_BORDER if name == "objectnet" else 0
    return lambda evaluator: evaluator.top1(name, samples, right, candidates, border)


def _with_occlusion(evaluator: Evaluator) -> Evaluator:
    return replace(evaluator, predict=lambda images: evaluator.predict(occlude(images)))


def _prepare_c(root: Path) -> Measure:
    """ImageNet-C: mCE over 15 corruptions with 5 severities."""
    folders = [folder.name for folder in root.iterdir() if folder.is_dir()]
    check_folders(set(folders) - EXTRA_CORRUPTIONS, dict.fromkeys(ALEXNET_ERRORS, ()), root)
    for corruption in ALEXNET_ERRORS:
        for severity in SEVERITIES:
            if not (root / corruption / severity).is_dir():
                raise ValueError(
                    f"{root}: has no {corruption}/{severity}; ImageNet-C has 15 corruptions at 5 severities"
                )

    def measure(evaluator: Evaluator) -> dict[str, float]:
        errors: dict[str, list[float]] = {}
        images = skipped = 0.0
        for corruption in ALEXNET_ERRORS:
            for severity in SEVERITIES:
                samples = load_samples(root / corruption / severity)
                found = evaluator.top1(f"c: {corruption} {severity}", samples, right_classes(samples, imagenet()))
                errors.setdefault(corruption, []).append(1 - found["top1"])
                images, skipped = images + found["images"], skipped + found["skipped"]
        return {**mean_corruption_error(errors), "images": images, "skipped": skipped}

    return measure


def _prepare_o(samples: Samples, paths: dict[str, str]) -> Measure:
    """ImageNet-O: AUPR of telling its images from validation images by their low confidence.

    Inliers are the validation images of the same 200 classes, and these classes are the only candidates.
    """
    if "val" not in paths:
        raise ValueError("o=PATH is compared with ImageNet's validation set: give val=PATH as well")
    classes = right_classes(samples, imagenet(), needed=())
    candidates = classes.any(0).nonzero()[:, 0]
    if len(candidates) != OUTLIER_CLASSES:
        raise ValueError(
            f"{samples.root}: has {len(candidates)} classes, but ImageNet-O has {OUTLIER_CLASSES}: unpack all of it"
        )
    val = load_samples(paths["val"])
    is_inlier = right_classes(val, imagenet())[:, candidates].any(1)

    def measure(evaluator: Evaluator) -> dict[str, float]:
        outliers = evaluator.confidences("o", samples, torch.ones(len(samples), dtype=torch.bool), candidates)
        inliers = evaluator.confidences("o: val", val, is_inlier, candidates)
        counts = [count_images(found.loader, found.readable, COUNT_AS_WRONG) for found in (outliers, inliers)]
        # Undecodable images and non-finite logits get the worst value.
        outlier_values = torch.where(outliers.readable, outliers.values, 1.0).nan_to_num(1.0)
        return {
            "aupr": average_precision(-outlier_values, -inliers.values.nan_to_num(0.0)),
            **{key: counts[0][key] + counts[1][key] for key in counts[0]},
        }

    return measure
