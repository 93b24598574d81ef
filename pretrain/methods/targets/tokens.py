"""Codes of a frozen tokenizer for every patch, as in BEiT; cross-entropy over the vocabulary.

Shapes: B images, N patches of an image, M of them predicted, V codes.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from data.pixel_format import IMAGENET, RGB, Pixels
from pretrain.methods.masking import Grid
from pretrain.methods.targets.base import PatchTarget, TargetConfig, as_sha256
from pretrain.methods.targets.tokenizers import Dalle, RandomProjection, random_projection_sha256, weights_sha256
from pretrain.models.patches import values_per_patch
from pretrain.trainer.schema import MAY_CHANGE


class TokensConfig(TargetConfig):
    """The keys of `target.name=tokens`; once validated, `sha256` is always that of the tokenizer."""

    name: Literal["tokens"] = "tokens"
    tokenizer: Literal["random_projection", "dalle"] = Field(
        "random_projection", description="random_projection: untrained, needs no weights; dalle: needs weights"
    )
    vocab_size: int = Field(8192, ge=2, description="number of codes")
    seed: int = Field(0, ge=0, lt=2**32, description="random_projection: seed of the projection and the codes")
    code_dim: int = Field(16, ge=1, description="random_projection: width of a code")
    weights: Annotated[str | None, MAY_CHANGE] = Field(
        None, description="dalle: weights of FlavaImageCodebook, a file or its folder"
    )
    sha256: str | None = Field(None, description="refuse any other tokenizer; filled in if unset")

    @field_validator("sha256")
    @classmethod
    def _sha256_matches_the_tokenizer(cls, given: str | None, info: ValidationInfo) -> str | None:
        keys = info.data
        if keys.keys() < {"tokenizer", "vocab_size", "seed", "code_dim", "weights"}:
            return given  # another key is invalid, which is reported
        if keys["tokenizer"] == "dalle":
            actual = weights_sha256(keys["weights"])
        elif keys["weights"] is not None:
            raise ValueError("target.weights is only read with target.tokenizer=dalle: set both or neither")
        else:
            actual = random_projection_sha256(keys["seed"], keys["vocab_size"], keys["code_dim"])
        return as_sha256("target.sha256", given, actual, "the tokenizer")

    def check_pixels(self, pixels: Pixels) -> None:
        if self.tokenizer == "dalle" and pixels.format != RGB:
            self.refuse_pixels("with target.tokenizer=dalle needs 8-bit RGB images", pixels)


class TokenTarget(PatchTarget):
    """The tokenizer's code for each patch."""

    caption = "Codes have no pixels: each is drawn in a color of its own. A prediction is right where the colors agree."

    def __init__(self, config: TokensConfig, grid: Grid, patch_size: int, pixels: Pixels = IMAGENET):
        self.patch_size, self.num_outputs = patch_size, config.vocab_size
        if config.tokenizer == "dalle":
            self.tokenizer: Dalle | RandomProjection = Dalle(config.weights, config.vocab_size, grid)
        else:
            self.tokenizer = RandomProjection(config.seed, config.vocab_size, config.code_dim, patch_size, pixels)

    def ground_truth(self, images: Tensor, patches: Tensor) -> Tensor:
        """(B, N, 1) int64"""
        return self.tokenizer(images).unsqueeze(-1)

    def loss(self, prediction: Tensor, truth: Tensor) -> Tensor:
        return F.cross_entropy(prediction.float().flatten(0, 1), truth.flatten())

    def render(self, prediction: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """Codes have no pixels: each is drawn in its own color. A prediction is right where both images agree."""
        codes = {"codes": truth[..., 0], "predicted codes": prediction.argmax(-1)}
        return {name: false_colors(code, values_per_patch(self.patch_size)) for name, code in codes.items()}


def false_colors(codes: Tensor, values: int) -> Tensor:
    """(..., M) codes -> (..., M, values) uint8 patches in one color per code; similar colors mean nothing."""
    factors = torch.tensor([151, 89, 37], device=codes.device)
    colors = (codes.unsqueeze(-1) * factors + codes.unsqueeze(-1) // factors) % 256
    return colors.byte().tile(values // 3)
