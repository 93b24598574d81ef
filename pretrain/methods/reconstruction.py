"""Reconstruction targets: what is predicted of a masked patch, and what a prediction costs.

The four cases of MAE's table (d): pixels, pixels normalised by patch, PCA coefficients, codes of a tokenizer. A target
is no `nn.Module`: nothing in it is trained, saved or partitioned.

Shapes: B images, N patches of an image, M of them predicted, P = p*p*3 values of a patch.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.methods.masking import Grid
from pretrain.methods.pca import PCAConfig, read_basis
from pretrain.methods.targets import normalize_pixels, patchify, pixel_target, predicted_pixels, to_pixels
from pretrain.methods.tokenizers import TokenizerConfig, build_tokenizer


class PatchTarget(ABC):
    """What is predicted.

    Attributes:
        outputs: values that a model predicts for each patch.
    """

    outputs: int

    @abstractmethod
    def truth(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 images -> (B, N, ...) what their patches' targets are made of, in raster order."""

    @abstractmethod
    def loss(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """The mean over all (B, M, outputs) predictions, in fp32; `truth` (B, M, ...) of the same patches."""

    @abstractmethod
    def shown(self, prediction: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """Pictures of the predicted patches by name, (B, M, P) uint8."""


class Pixels(PatchTarget):
    """Standardised pixels, with `norm_pix` by the patch's own statistics; squared error."""

    def __init__(self, patch: int, norm_pix: bool):
        self.patch, self.norm_pix, self.outputs = patch, norm_pix, patch**2 * 3

    def truth(self, images: Tensor) -> Tensor:
        return patchify(images, self.patch)

    def loss(self, prediction: Tensor, truth: Tensor) -> Tensor:
        return (prediction.float() - pixel_target(truth, self.norm_pix)).square().mean()

    def shown(self, prediction: Tensor, truth: Tensor) -> dict[str, Tensor]:
        return {"reconstruction": predicted_pixels(prediction, truth, self.norm_pix)}


class Coefficients(PatchTarget):
    """The largest PCA coefficients of a patch's standardised pixels (96 of 768 in MAE's paper); squared error."""

    def __init__(self, config: PCAConfig, patch: int):
        self.patch = patch
        mean, components = read_basis(config.file, patch)
        self.mean, self.components = mean.float(), components.float()  # (P,) and (outputs, P)
        self.outputs = len(components)

    def truth(self, images: Tensor) -> Tensor:
        return patchify(images, self.patch)

    def loss(self, prediction: Tensor, truth: Tensor) -> Tensor:
        with torch.autocast(truth.device.type, enabled=False):  # a matrix product: bf16 would round the target
            self._move(truth.device)
            coefficients = (normalize_pixels(truth) - self.mean) @ self.components.T
        return (prediction.float() - coefficients).square().mean()

    def shown(self, prediction: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """What the predicted coefficients span; the smaller ones are missing."""
        self._move(truth.device)
        return {"reconstruction": to_pixels(prediction.float() @ self.components + self.mean)}

    def _move(self, device: torch.device) -> None:
        self.mean, self.components = self.mean.to(device), self.components.to(device)


class Codes(PatchTarget):
    """A frozen tokenizer's codes, as in BEiT; cross-entropy over its vocabulary."""

    def __init__(self, config: TokenizerConfig, grid: Grid, patch: int):
        self.tokenizer = build_tokenizer(config, grid, patch)
        self.patch, self.outputs = patch, config.codes

    def truth(self, images: Tensor) -> Tensor:
        return self.tokenizer(images).unsqueeze(-1)

    def loss(self, prediction: Tensor, truth: Tensor) -> Tensor:
        return F.cross_entropy(prediction.float().flatten(0, 1), truth.flatten())

    def shown(self, prediction: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """Codes have no pixels: each is a flat colour of its own. A patch is right where both pictures agree."""
        codes = {"codes": truth[..., 0], "predicted codes": prediction.argmax(-1)}
        return {name: false_colours(code, self.patch**2 * 3) for name, code in codes.items()}


def check_target(name: str, pca: PCAConfig | None, tokenizer: TokenizerConfig | None, patch: int) -> None:
    """Raises ValueError where a target lacks what it is made with, or something is given that it does not read."""
    for target, section, key in (("pca", pca, "pca.file"), ("token", tokenizer, "tokenizer.name")):
        if name == target and section is None:
            raise ValueError(f"method.target={target} needs method.{key}")
        if name != target and section is not None:
            section_name = key.partition(".")[0]
            raise ValueError(f"method.{section_name} is only read with method.target={target}: set both or none")
    if pca is not None:
        read_basis(pca.file, patch)


def build_target(
    name: str, pca: PCAConfig | None, tokenizer: TokenizerConfig | None, grid: Grid, patch: int
) -> PatchTarget:
    """The target of a configuration that `check_target` has accepted."""
    if pca is not None:
        return Coefficients(pca, patch)
    if tokenizer is not None:
        return Codes(tokenizer, grid, patch)
    return Pixels(patch, norm_pix=name == "norm_pix")


def false_colours(codes: Tensor, values: int) -> Tensor:
    """(..., M) codes -> (..., M, values) uint8 patches of one colour a code; alike colours mean nothing."""
    factors = torch.tensor([151, 89, 37], device=codes.device)
    colours = (codes.unsqueeze(-1) * factors + codes.unsqueeze(-1) // factors) % 256
    return colours.byte().tile(values // 3)
