"""A trained classifier from its file, ready to predict."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from downstream.checkpoints.files import read_source
from downstream.classify.classifier_spec import ClassifierSpec
from downstream.classify.model import build_vit
from pretrain.models.patches import normalize_pixels


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier from a file.

    Attributes:
        path: the file.
        model: timm's, in eval mode: standardized pixels (B, 3, H, W) -> logits.
        image_size: (H, W) of its images.
        num_classes: outputs of its head.
        class_names: in the order of the labels; empty where the shards that it was trained on have none.
        multi_label: whether each output is a decision of its own.
    """

    path: Path
    model: nn.Module
    image_size: tuple[int, int]
    num_classes: int
    class_names: tuple[str, ...]
    multi_label: bool = False

    def predict(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> logits (B, C), in fp32."""
        logits: Tensor = self.model(normalize_pixels(images).movedim(-1, 1))
        return logits.float()


def load_classifier(path: Path | str, device: torch.device) -> TrainedClassifier:
    """Reads a classifier that this project saved: timm's parameter names, and in the metadata how to build it.

    Raises:
        ValueError: it is damaged, or not such a classifier.
    """
    source = read_source(path)
    spec, tensors = ClassifierSpec.from_metadata(source.metadata), source.tensors
    if spec is None or "head.weight" not in tensors:
        raise ValueError(
            f"{path} is not a classifier of this project: it lacks arch, patch_size, image_size, position, "
            f"num_classes, pool or a head"
        )
    encoder, num_classes = spec.encoder, len(tensors["head.weight"])
    model = build_vit(encoder, num_classes, spec.pool, fc_norm="fc_norm.weight" in tensors)
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path} does not fit {encoder.arch}/{encoder.patch_size}: {reason}") from None
    model.to(device).eval()
    return TrainedClassifier(Path(path), model, encoder.image_size, num_classes, spec.class_names, spec.multi_label)
