"""The largest PCA coefficients of a patch's standardized pixels (96 of 768 in MAE's table 1d); squared error.

The components are in a small file, computed from shards by `python -m pretrain.fit_pca`: once and not during training,
so that a run does not depend on when or on how many ranks this was done. The file's SHA-256 identifies them.
"""

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data.pixel_format import IMAGENET, Pixels
from pretrain.methods.masking import Grid
from pretrain.methods.targets.base import PatchTarget, TargetConfig, as_sha256
from pretrain.models.patches import normalize_pixels, to_pixels, values_per_patch
from pretrain.trainer.config import ModelConfig
from pretrain.trainer.run_folder import file_digest
from pretrain.trainer.schema import MAY_CHANGE


class PCAConfig(TargetConfig):
    """The keys of `target.name=pca`; once validated, `sha256` is always that of the file."""

    name: Literal["pca"] = "pca"
    file: Annotated[str, MAY_CHANGE] = Field(description="written by `python -m pretrain.fit_pca SHARDS FILE`")
    sha256: str | None = Field(None, description="refuse any other file; filled in if unset")

    @field_validator("file")
    @classmethod
    def _file_exists(cls, file: str) -> str:
        if not Path(file).is_file():
            raise ValueError(
                f"target.file={file!r} is not a file: make it with `python -m pretrain.fit_pca SHARDS FILE`"
            )
        return file

    @field_validator("sha256")
    @classmethod
    def _sha256_matches_the_file(cls, given: str | None, info: ValidationInfo) -> str | None:
        if "file" not in info.data:
            return given  # the file is invalid, which is reported
        return as_sha256("target.sha256", given, file_digest(info.data["file"]), info.data["file"])

    def check(self, grid: Grid, model: ModelConfig) -> None:
        read_components(self.file, model.patch_size)

    def check_pixels(self, pixels: Pixels) -> None:
        if pixels != IMAGENET:
            self.refuse_pixels("needs 8-bit RGB images with ImageNet's mean and standard deviation", pixels)


class PCATarget(PatchTarget):
    """The coefficients of the stored components."""

    def __init__(self, config: PCAConfig, patch_size: int):
        mean, components = read_components(config.file, patch_size)
        self.mean, self.components = mean.float(), components.float()  # (P,) and (num_outputs, P)
        self.num_outputs = len(components)
        self.caption = f"The target is {len(components)} principal components of each patch: the others are missing."

    def ground_truth(self, images: Tensor, patches: Tensor) -> Tensor:
        return patches

    def loss(self, prediction: Tensor, truth: Tensor) -> Tensor:
        with torch.autocast(truth.device.type, enabled=False):  # a matrix product, which would round the target to bf16
            self._to(truth.device)
            coefficients = (normalize_pixels(truth) - self.mean) @ self.components.T
        return (prediction.float() - coefficients).square().mean()

    def render(self, prediction: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """The patches given by the predicted coefficients; smaller components are missing."""
        self._to(truth.device)
        return {"reconstruction": to_pixels(prediction.float() @ self.components + self.mean)}

    def _to(self, device: torch.device) -> None:
        self.mean, self.components = self.mean.to(device), self.components.to(device)


def read_components(file: str, patch_size: int) -> tuple[Tensor, Tensor]:
    """The mean (P,) and the components (K, P), largest variance first, of standardized patches.

    Raises:
        ValueError: the file holds no components, or components for another patch size.
    """
    try:
        stored = load_file(file)
        mean, components = stored["mean"], stored["components"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"target.file={file!r} holds no components ({error}): make it with `python -m pretrain.fit_pca SHARDS FILE`"
        ) from None
    num_values = values_per_patch(patch_size)
    if len(mean) != num_values:
        raise ValueError(
            f"target.file={file!r} is for patches of {len(mean)} values, but model.patch_size={patch_size} has "
            f"{num_values}: make one with `python -m pretrain.fit_pca SHARDS FILE --patch-size {patch_size}`"
        )
    return mean, components


def principal_components(covariance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The eigenvectors of the largest eigenvalues; signs, which are arbitrary, make the largest entry positive.

    Args:
        covariance: (P, P) float64, symmetric.
        count: the number of components, K.

    Returns:
        Components (K, P), orthonormal, and their variances (K,), largest first.
    """
    variances, vectors = torch.linalg.eigh(covariance)
    components = vectors.flip(1)[:, :count].T
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return components * largest.sign(), variances.flip(0)[:count]
