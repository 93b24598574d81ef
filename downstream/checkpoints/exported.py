"""An encoder or a classifier on its way to another library."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from data.pixel_format import RGB
from downstream.checkpoints.classifiers import ClassifierWeights
from downstream.checkpoints.compare import FLOAT64_TOLERANCE, float64_copy, max_difference, random_images
from downstream.checkpoints.report import Report
from downstream.checkpoints.timm_models import SIZES, model_name, prefix_options, to_timm
from downstream.classify.classifier_spec import ClassifierSpec
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.features import features
from pretrain.models.vit import ViT

TimmOptions = dict[str, int | str | bool | tuple[int, int]]


class Features(nn.Module):
    """`features` of an encoder as a module: (B, C, H, W) standardized pixels -> (B, 1+N, D)."""

    def __init__(self, encoder: ViT):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return features(self.encoder, images)


class Export:
    """An encoder or a classifier on its way to another library.

    Args:
        encoder: in fp32; None if a classifier is exported.
        spec: of the encoder.
        report: what became of the source's keys.
        classifier: to be exported whole.

    Attributes:
        model: computes what the export must: features or logits of (B, C, H, W) standardized pixels.
        tensors: its parameters by timm's names, in fp32.
        metadata: how to rebuild it.
    """

    def __init__(
        self, encoder: ViT | None, spec: EncoderSpec, report: Report, classifier: ClassifierWeights | None = None
    ):
        self.spec, self.report = spec, report
        self.classifier: ClassifierSpec | None = classifier.spec if classifier else None
        self.model: nn.Module
        if classifier is not None:
            self.model, tensors = classifier.build(), classifier.state
        else:
            assert encoder is not None
            self.model, tensors = Features(encoder).eval(), to_timm(spec, encoder.state_dict())
        self.tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        self.metadata = {**(self.classifier or spec).to_metadata(), "weights": report.weights}

    @property
    def what(self) -> str:
        """What it computes, in a word."""
        return "logits" if self.classifier else "features"

    def timm_call(self) -> tuple[str, TimmOptions]:
        """Name and arguments of `timm.create_model`."""
        arch, patch_size, (height, width) = self.spec.arch, self.spec.patch_size, self.spec.image_size
        square = height if height == width else 0
        options: TimmOptions = {}
        if self.spec.position == "sincos":
            named_patch, named_size = (14 if arch == "vit_huge" else 16), 224
            name = f"{arch}_patch{named_patch}_{named_size}"
            options["num_classes"] = 0
        else:
            entry = (arch, patch_size, square)
            named_patch, named_size = entry[1:] if entry in SIZES else (16, 224)
            name = model_name(arch, named_patch, named_size)
            if self.spec.position == "bias":
                options["position"] = "bias"
        if patch_size != named_patch:
            options["patch_size"] = patch_size
        if square != named_size:
            options["img_size"] = square or (height, width)
        if self.classifier is not None:
            options |= {"num_classes": self.classifier.num_classes, "global_pool": self.classifier.pool}
        if self.spec.pixels.channels != RGB.channels:
            options["in_chans"] = self.spec.pixels.channels
        options |= prefix_options(self.spec)
        if not self.spec.class_token:
            options["global_pool"] = "avg"
        if options.get("global_pool") == "avg" and "fc_norm.weight" not in self.tensors:
            options["fc_norm"] = False
        return name, options

    @torch.no_grad()
    def check(self, compute: Callable[[Tensor], Tensor]) -> float:
        """Compares the export's outputs with the source's in float64; returns their `max_difference`.

        Args:
            compute: the export, already in float64: (B, C, H, W) images -> its features or logits.

        Raises:
            ValueError: the difference is larger than `FLOAT64_TOLERANCE`.
        """
        images = random_images(*self.spec.image_size, self.spec.pixels.channels)
        found = compute(images)
        rows, cols = self.spec.grid
        if self.classifier is None and found.shape[1] == rows * cols:  # other libraries do not put the mean in front
            found = torch.cat([found.mean(1, keepdim=True), found], dim=1)
        return self.accept(max_difference(found, float64_copy(self.model)(images)), FLOAT64_TOLERANCE, "float64")

    def accept(self, difference: float, tolerance: float, precision: str) -> float:
        """Returns the difference; raises ValueError if it is larger than the tolerance."""
        if not difference <= tolerance:  # or NaN
            raise ValueError(
                f"the export of {self.report.path} computes different {self.what}: in {precision} they differ by "
                f"{difference:.2g} of the largest (at most {tolerance:.0e})"
            )
        return difference
