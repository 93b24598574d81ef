"""Loads a trained classifier from its file, ready to predict."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data.pixel_format import IMAGENET, Pixels
from downstream.checkpoints.classifiers import load_classifier_weights
from pretrain.models.patches import normalize_pixels
from pretrain.trainer.checkpoint_layout import checkpoint_names
from pretrain.trainer.run_folder import RunFolder


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier from a file.

    Attributes:
        path: the file.
        model: timm's, in eval mode: standardized pixels (B, channels, H, W) -> logits.
        image_size: (H, W) of its images.
        num_classes: outputs of its head.
        class_names: in the order of the labels; empty if unknown.
        multi_label: whether each output is an independent decision.
        pixels: of its images.
    """

    path: Path
    model: nn.Module
    image_size: tuple[int, int]
    num_classes: int
    class_names: tuple[str, ...]
    multi_label: bool = False
    pixels: Pixels = IMAGENET

    def predict(self, images: Tensor) -> Tensor:
        """Images of `pixels`, (B, H, W, channels) -> logits (B, C), in fp32."""
        logits: Tensor = self.model(normalize_pixels(images, self.pixels).movedim(-1, 1))
        return logits.float()


def load_classifier(path: Path | str, device: torch.device) -> TrainedClassifier:
    """Reads a classifier saved by this project, or a published one; for the latter, prints what happened to its keys.

    Raises:
        ValueError: it is damaged, not a classifier, or the folder of a run that has not finished.
    """
    folder = RunFolder(Path(path))
    if checkpoint_names(folder.checkpoints) and not folder.model.is_file():
        raise ValueError(
            f"{path} has no {folder.model.name}, which a fine-tuning writes at its end: if it was stopped, run its "
            f"command again"
        )
    found = load_classifier_weights(path)
    if found is None:
        raise ValueError(
            f"{path} is not a classifier: it lacks a head (head.weight, fc or classifier), or it is this project's and "
            f"lacks arch, patch_size, image_size, position, num_classes or pool in its metadata"
        )
    if found.report.library and not (torch.distributed.is_initialized() and torch.distributed.get_rank()):
        print(found.report, file=sys.stderr)
    spec = found.spec
    model = found.build().to(device)
    size, pixels = spec.encoder.image_size, spec.encoder.pixels
    return TrainedClassifier(Path(path), model, size, spec.num_classes, spec.class_names, spec.multi_label, pixels)
