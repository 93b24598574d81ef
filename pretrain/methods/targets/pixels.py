"""Pixels, standardized by their channels' statistics; with `norm_pix`, then by each patch's own (MAE, section 3)."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from data.pixel_format import Pixels
from pretrain.methods.targets.base import PatchTarget, TargetConfig
from pretrain.models.patches import pixel_target, predicted_pixels, values_per_patch


class PixelsConfig(TargetConfig):
    """The keys of `target.name=pixels`."""

    name: Literal["pixels"] = "pixels"
    norm_pix: bool = Field(True, description="normalize each patch by its own mean and variance")
    loss: Literal["mse", "l1"] = Field("mse", description="squared or absolute error")


class PixelTarget(PatchTarget):
    """The pixels of the patch."""

    def __init__(self, config: PixelsConfig, patch_size: int, pixels: Pixels):
        self.norm_pix, self.l1, self.pixels = config.norm_pix, config.loss == "l1", pixels
        self.num_outputs = values_per_patch(patch_size, pixels.channels)
        if config.norm_pix:
            self.caption = (
                "The target is normalized patches (target.norm_pix): a patch's mean and contrast are not predicted. "
                "The prediction alone uses the same values for all patches. Put back into the image, it takes "
                "those of the true patches and so looks better than it is."
            )

    def ground_truth(self, images: Tensor, patches: Tensor) -> Tensor:
        return patches

    def loss(self, prediction: Tensor, truth: Tensor) -> Tensor:
        error = prediction.float() - pixel_target(truth, self.norm_pix, self.pixels)
        return (error.abs() if self.l1 else error.square()).mean()

    def render(self, prediction: Tensor, truth: Tensor) -> dict[str, Tensor]:
        return predicted_pixels(prediction, truth, self.norm_pix, self.pixels)
