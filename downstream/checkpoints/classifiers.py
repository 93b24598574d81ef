"""Classifiers from files: this project's, and published ones (MAE's, LoMaR's, DeiT's, BEiT's, timm's and others).

A published file does not say how its tokens are pooled, but its norms show it: MAE's, LoMaR's, BEiT's and SimMIM's
classifiers average the patch tokens before the last norm, `fc_norm`; DeiT's and timm's read the class token after it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from timm.data import ImageNetInfo
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from data.pixel_format import Pixels
from downstream.checkpoints.choose import Weights
from downstream.checkpoints.files import Source, read_source
from downstream.checkpoints.fold import fold_batch_norm
from downstream.checkpoints.formats import EncoderWeights, translate
from downstream.checkpoints.report import Report
from downstream.checkpoints.timm_models import build_vit, to_timm
from downstream.classify.classifier_spec import ClassifierSpec

# Number of classes of each set of ImageNet -> timm's name for it. The classes are in the order of timm's lists: sorted
# by WordNet's ids, except for Microsoft's 21,842.
_IMAGENETS = {
    1000: "imagenet-1k",
    11221: "imagenet-21k-miil",
    11821: "imagenet-12k",
    21841: "imagenet-22k",
    21842: "imagenet-22k-ms",
    21843: "imagenet-21k-goog",
}
_ENDS_OF_IMAGENET = ("tench", "toilet tissue")  # first and last of 1000, in words, as in transformers' configurations
_PROBE = "head.0.running_"


@dataclass(frozen=True)
class ClassifierWeights:
    """A classifier from a file.

    Attributes:
        spec: what it is; its images have the encoder's size and pixels.
        state: the parameters of `build()` by timm's names, in fp32.
        report: what became of the file's keys.
    """

    spec: ClassifierSpec
    state: dict[str, Tensor]
    report: Report

    def build(self) -> VisionTransformer:
        """The model, in eval mode: standardized pixels (B, C, H, W) -> logits (B, C).

        Raises:
            ValueError: the weights do not fit `spec`.
        """
        encoder = self.spec.encoder
        fc_norm = "fc_norm.weight" in self.state
        model = build_vit(encoder, self.spec.num_classes, self.spec.pool, fc_norm=fc_norm)
        try:
            model.load_state_dict(self.state, strict=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(f"{self.report.path} does not fit {encoder.arch}/{encoder.patch_size}: {reason}") from None
        return model.eval()


def load_classifier_weights(
    path: Path | str, *, weights: Weights | None = None, pixels: Pixels | None = None
) -> ClassifierWeights | None:
    """Reads the classifier of a file or folder; None if it holds only an encoder.

    Args:
        path, weights: as in `load_encoder`.
        pixels: as in `formats.translate`.

    Raises:
        ValueError: as in `load_encoder`; the head is not a matrix on the encoder's width; or there are two last norms.
    """
    source = read_source(path, weights)
    own = ClassifierSpec.from_metadata(source.metadata)
    if own is not None and "head.weight" in source.tensors:
        report = Report(source.path, source.weights, used={name: (name,) for name in source.tensors})
        return ClassifierWeights(own, source.tensors, report)
    if own is not None or source.spec is not None:
        return None
    found = translate(source, pixels)
    head = _fold_probe(found.head)
    if "head.weight" not in head:
        return None
    width = len(found.state["norm.weight"]) if "norm.weight" in found.state else 0
    if head["head.weight"].ndim != 2 or head["head.weight"].shape[1] != width or "head.bias" not in head:
        raise ValueError(
            f"{path}: its head is {tuple(head['head.weight'].shape)}, but must be a matrix on the encoder's width "
            f"({width}) with a bias"
        )
    num_classes = len(head["head.weight"])
    spec = ClassifierSpec(found.spec, num_classes, _find_pool(source, found), _find_names(source, num_classes))
    return ClassifierWeights(spec, _join(found, head), _report_head(found))


def _find_pool(source: Source, found: EncoderWeights) -> str:
    if found.pool_norm:
        return "avg"
    if "fc_norm.weight" in found.head:
        raise ValueError(f"{source.path} has norms before and after the pool: this classifier has only one of them")
    recorded = source.hub.pool if source.hub else None
    return recorded or ("token" if found.spec.class_token else "avg")


def _find_names(source: Source, num_classes: int) -> tuple[str, ...]:
    """The classes in the order of the labels; ImageNet's by their WordNet ids."""
    names = source.hub.class_names if source.hub else ()
    if len(names) != num_classes:
        names = ()
    ends = tuple(names[end].split(",")[0].lower() for end in (0, -1)) if names else _ENDS_OF_IMAGENET
    if num_classes in _IMAGENETS and (ends == _ENDS_OF_IMAGENET or num_classes != 1000):
        return tuple(ImageNetInfo(_IMAGENETS[num_classes]).label_names())
    return names


def _report_head(found: EncoderWeights) -> Report:
    """The report of the encoder, with the head's keys as used."""
    report = found.report
    for name, key in found.head_keys.items():
        report.used[name] = (key,)
        report.dropped.pop(key, None)
    if found.pool_norm:
        for kind in ("weight", "bias"):
            del report.used[f"norm.{kind}"], report.folded[f"norm.{kind}"]
    return report


def _join(found: EncoderWeights, head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Joins encoder and head into the parameters of timm's model."""
    state = dict(found.state)
    if found.pool_norm:
        state |= {f"fc_norm.{kind}": state.pop(f"norm.{kind}") for kind in ("weight", "bias")}
    return to_timm(found.spec, state) | {
        name: tensor for name, tensor in head.items() if name in ("head.weight", "head.bias")
    }


def _fold_probe(head: dict[str, Tensor]) -> dict[str, Tensor]:
    """Folds the batch norm of a linear probe into the matrix after it."""
    if _PROBE + "var" not in head or "head.1.weight" not in head or head["head.1.weight"].ndim != 2:
        return head
    norm = (head[_PROBE + "mean"], head[_PROBE + "var"])
    weight, bias = fold_batch_norm(head["head.1.weight"], head["head.1.bias"], *norm)
    return {"head.weight": weight, "head.bias": bias}
