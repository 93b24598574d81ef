"""Top-1 and top-5 of a classifier: `python -m downstream.classify.evaluate CHECKPOINT --data SHARDS_OR_FOLDER`.

Also by torchrun, srun or deepspeed, on any number of processes: each image counts once, and one that cannot be decoded
counts as wrong. The last line is a JSON object.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from data.eval_loader import EvalLoader
from data.image_folder import Samples, load_samples
from downstream.checkpoints.files import read_source
from downstream.classify.evaluation_cli import Place, add_loading_options, run_on_ranks
from downstream.classify.model import build_vit
from pretrain.models.patches import normalize_pixels
from pretrain.trainer.per_sample import compute_per_sample, unreadable_keys

Predict = Callable[[Tensor], Tensor]
SHOWN_NAMES = 20


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier from a file.

    Attributes:
        size: (H, W) of its images.
        classes: how many it tells apart.
        names: theirs, in order; none where the shards that it was trained on had none.
    """

    path: Path
    model: nn.Module
    size: tuple[int, int]
    classes: int
    names: tuple[str, ...]

    def predict(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> logits (B, C), in fp32."""
        logits: Tensor = self.model(normalize_pixels(images).movedim(-1, 1))
        return logits.float()


def load_classifier(path: Path | str, device: torch.device) -> TrainedClassifier:
    """A classifier of this project: timm's names and, in the metadata, how to build it.

    Raises:
        ValueError: it is damaged, or no such classifier.
    """
    source = read_source(path)
    spec, metadata, tensors = source.spec, source.metadata, source.tensors
    if spec is None or "pool" not in metadata or "head.weight" not in tensors:
        raise ValueError(
            f"{path} is no classifier of this project: it lacks arch, patch_size, image_size, position, pool or head"
        )
    classes, own_norm = len(tensors["head.weight"]), "fc_norm.weight" in tensors
    names = tuple(json.loads(metadata.get("names", "[]")))
    model = build_vit(
        spec.arch, spec.patch_size, spec.image_size, spec.position, classes, metadata["pool"], fc_norm=own_norm
    )
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path} does not fit {spec.arch}/{spec.patch_size}: {reason}") from None
    return TrainedClassifier(Path(path), model.to(device).eval(), spec.image_size, classes, names)


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
        samples: with a label each.
        size: (H, W) of the central crops.
        batch: images of one rank at once.

    Returns:
        `top1` and `top5` as shares of all `images`, and how many of these were `skipped`: undecodable, therefore
        wrong, and named on stderr.

    Raises:
        ValueError: samples without labels, or labels beyond the logits.
    """
    check_labels(samples)
    labels = torch.from_numpy(samples.label).long()

    def hits_of(images: Tensor, numbers: Tensor) -> Tensor:
        logits = predict(images)
        if labels.max() >= logits.shape[1]:
            raise ValueError(f"{samples.root} has label {labels.max()}, the classifier {logits.shape[1]} classes")
        return top_hits(logits, labels[numbers].to(device))

    once = EvalLoader(samples, size=size, batch=batch, rank=rank, world_size=world_size, num_workers=num_workers)
    hits, readable = compute_per_sample(hits_of, once, device, "evaluating")
    top1, top5 = hits.sum(0).tolist()
    return {"top1": top1 / len(hits), "top5": top5 / len(hits), **count_images(once, readable)}


def top_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, 2) of 0 and 1: whether the label has the largest logit, and whether one of the five largest.

    Logits that are not finite hit nothing: NaN counts as the largest, and so a classifier that diverged would be right
    about its first class.
    """
    hit = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    hit &= torch.isfinite(logits).all(1, keepdim=True)
    return torch.stack([hit[:, 0], hit.any(1)], dim=1).long()


def check_labels(samples: Samples) -> None:
    """Raises ValueError where a sample has no label."""
    if (samples.label < 0).any():
        first = samples.keys[int((samples.label < 0).argmax())]
        raise ValueError(f"{samples.root}: '{first}' has no label: give class folders, or shards with .cls files")


def count_images(once: EvalLoader, readable: Tensor) -> dict[str, int]:
    """How many images, how many of them undecodable; the main rank names the latter."""
    keys = unreadable_keys(once, readable)
    if keys and once.rank == 0:
        more = f" and {len(keys) - SHOWN_NAMES} more" if len(keys) > SHOWN_NAMES else ""
        print(
            f"{len(keys)} of {len(readable)} images cannot be decoded and count as wrong: "
            f"{', '.join(keys[:SHOWN_NAMES])}{more}",
            file=sys.stderr,
        )
    return {"images": len(readable), "skipped": len(keys)}


def check_classes(trained: TrainedClassifier, samples: Samples) -> None:
    """Raises ValueError where the data has other classes than the classifier, or another number of them."""
    if samples.classes and len(samples.classes) != trained.classes:
        raise ValueError(
            f"{trained.path} tells {trained.classes} classes apart, {samples.root} has {len(samples.classes)}: "
            f"evaluate it on the data set that it was trained for"
        )
    if other := first_class_mismatch(trained.names, samples.classes):
        label, ours, theirs = other
        raise ValueError(
            f"label {label} is '{ours}' to {trained.path} and '{theirs}' in {samples.root}: "
            f"evaluate it on the data set that it was trained for"
        )


def first_class_mismatch(names: Sequence[str], others: Sequence[str]) -> tuple[int, str, str] | None:
    """The first label that two sets of classes give to different ones, if both have names, and these."""
    pairs = enumerate(zip(names, others, strict=False))
    return next(((label, name, other) for label, (name, other) in pairs if name != other), None)


def _command(options: argparse.Namespace, place: Place) -> dict[str, Any]:
    world, device = place
    trained, samples = load_classifier(options.checkpoint, device), load_samples(options.data)
    check_classes(trained, samples)
    return evaluate(
        trained.predict,
        samples,
        size=trained.size,
        batch=options.batch,
        rank=world.rank,
        world_size=world.size,
        num_workers=options.workers,
        device=device,
    )


def main(arguments: list[str] | None = None) -> NoReturn:
    """Exit code 0 and one JSON line, or 1 and one clear error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a classifier's model.safetensors")
    parser.add_argument(
        "--data", required=True, metavar="SHARDS_OR_FOLDER", help="shards, or a folder of class folders"
    )
    add_loading_options(parser)
    run_on_ranks(functools.partial(_command, parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
