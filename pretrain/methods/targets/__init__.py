"""Targets of a masked patch and their losses: pixels, PCA coefficients, edges (HOG) or a tokenizer's codes."""

from typing import Annotated

from pydantic import Field

from pretrain.methods.masking import Grid
from pretrain.methods.targets.base import PatchTarget, TargetConfig
from pretrain.methods.targets.hog import HOGConfig, HOGTarget
from pretrain.methods.targets.pca import PCAConfig, PCATarget
from pretrain.methods.targets.pixels import PixelsConfig, PixelTarget
from pretrain.methods.targets.tokens import TokensConfig, TokenTarget

__all__ = [
    "TARGETS",
    "AnyTargetConfig",
    "HOGConfig",
    "PCAConfig",
    "PatchTarget",
    "PixelsConfig",
    "TargetConfig",
    "TokensConfig",
]

TARGETS: dict[str, type[TargetConfig]] = {
    "pixels": PixelsConfig,
    "pca": PCAConfig,
    "hog": HOGConfig,
    "tokens": TokensConfig,
}

AnyTargetConfig = Annotated[PixelsConfig | PCAConfig | HOGConfig | TokensConfig, Field(discriminator="name")]


def build_target(config: TargetConfig, grid: Grid, patch_size: int) -> PatchTarget:
    """Builds the target of a configuration, for images of a grid of patches.

    Raises:
        ValueError: its file is not a valid one.
    """
    if isinstance(config, PCAConfig):
        return PCATarget(config, patch_size)
    if isinstance(config, HOGConfig):
        return HOGTarget(config, grid, patch_size)
    if isinstance(config, TokensConfig):
        return TokenTarget(config, grid, patch_size)
    assert isinstance(config, PixelsConfig)
    return PixelTarget(config, patch_size)
