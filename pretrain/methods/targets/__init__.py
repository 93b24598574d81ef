"""What is predicted for a masked patch, and the loss: pixels, PCA coefficients, edges, codes or features."""

from typing import Annotated

from pydantic import Field

from data.pixel_format import IMAGENET, Pixels
from pretrain.methods.masking import Grid
from pretrain.methods.targets.base import PatchTarget, TargetConfig
from pretrain.methods.targets.features import EMAConfig, FeatureTarget, FeatureTeacher, TeacherConfig
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
    "TeacherConfig",
    "TokensConfig",
]

TARGETS: dict[str, type[TargetConfig]] = {
    "pixels": PixelsConfig,
    "pca": PCAConfig,
    "hog": HOGConfig,
    "tokens": TokensConfig,
    "teacher": TeacherConfig,
    "ema": EMAConfig,
}

AnyTargetConfig = Annotated[
    PixelsConfig | PCAConfig | HOGConfig | TokensConfig | TeacherConfig | EMAConfig, Field(discriminator="name")
]


def build_target(
    config: TargetConfig,
    grid: Grid,
    patch_size: int,
    teacher: FeatureTeacher | None = None,
    pixels: Pixels = IMAGENET,
) -> PatchTarget:
    """Builds the target of a configuration for a grid of patches; `teacher` computes the features to predict, if any.

    Raises:
        ValueError: the target's file is not valid.
    """
    if isinstance(config, TeacherConfig | EMAConfig):
        assert teacher is not None, "whoever builds such a target has its teacher"
        return FeatureTarget(config, patch_size, teacher)
    if isinstance(config, PCAConfig):
        return PCATarget(config, patch_size)
    if isinstance(config, HOGConfig):
        return HOGTarget(config, grid, patch_size, pixels.channels)
    if isinstance(config, TokensConfig):
        return TokenTarget(config, grid, patch_size, pixels)
    assert isinstance(config, PixelsConfig)
    return PixelTarget(config, patch_size, pixels)
