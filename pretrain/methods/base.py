"""The interface of a method: what the step loop, the data loader and the add-ons require.

Shapes: B images, N patches of an image, V of them visible, M masked, D the encoder's width.
"""

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, NamedTuple

from pydantic import Field
from torch import Tensor, nn

from data.batch import MaskSampler
from pretrain.methods.masking import Grid
from pretrain.methods.pr_mim import PRMIMConfig
from pretrain.methods.targets import TARGETS, PatchTarget, PixelsConfig, TargetConfig
from pretrain.models.patches import gather_tokens, patchify, render_predictions, show_patches
from pretrain.models.vit import ViT
from pretrain.trainer.config import ModelConfig
from pretrain.trainer.schema import MAY_CHANGE, Section

MaskIndices = dict[str, Tensor]  # (B, ...) int64 each: the arrays of a mask sampler, stacked over images


class MethodConfig(Section):
    """The keys of a method; `name` is a literal that selects the method."""

    name: str
    module: Annotated[str | None, MAY_CHANGE] = Field(
        None, description="your own Python file or module that defines the method; give it on the command line"
    )

    def check(self, grid: Grid, model: ModelConfig) -> None:
        """Raises ValueError, naming the key to change, if the keys do not fit the image's grid or the encoder."""

    def count_patches(self, grid: Grid, patch_size: int) -> tuple[int, int]:
        """The number of patches encoded together (of an image or of a window), and how many of them are masked."""
        raise NotImplementedError

    def on_grid(self, grid: Grid, final: Grid) -> "MethodConfig":
        """The keys for the other grids of `data.size_schedule`; `final` is the grid of `data.image_size`."""
        return self

    def sequence_grid(self, grid: Grid) -> Grid:
        """Rows and columns of the patches that are encoded together: those of the image, or of a window."""
        return grid

    def check_target(self, target: TargetConfig, patch_size: int) -> None:
        """Raises ValueError if the target's keys do not fit these."""

    def check_pr_mim(self) -> None:
        """Raises ValueError if PR-MIM cannot be used with these keys."""

    def check_lut(self) -> None:
        """Raises ValueError if LUT cannot be used with these keys."""


class Method(nn.Module, ABC):
    """Owns encoder, predictor and loss. Parameters are used only inside the `forward` of the module that owns them.

    Attributes:
        add_ons: names of the add-ons that the method supports.
        targets: names of the targets that it can predict; by default all of them.
        default_target: the target if the configuration names none.
        encoder: the model to pretrain.
        target: what is predicted.
    """

    Config: ClassVar[type[MethodConfig]]
    add_ons: ClassVar[frozenset[str]] = frozenset()
    targets: ClassVar[frozenset[str]] = frozenset(TARGETS)
    default_target: ClassVar[TargetConfig] = PixelsConfig(norm_pix=True)

    encoder: ViT
    target: PatchTarget

    @abstractmethod
    def __init__(self, config: MethodConfig, encoder: ViT, target: PatchTarget, pr_mim: PRMIMConfig | None = None):
        super().__init__()

    @abstractmethod
    def mask_sampler(self) -> MaskSampler:
        """A picklable function that draws the mask indices of one sample; called in the data workers."""

    @abstractmethod
    def forward(self, images: Tensor, mask_indices: MaskIndices) -> dict[str, Tensor]:
        """A batch's `loss`, and other values to log, detached; `loss_*` are the terms of the loss.

        Args:
            images: (B, H, W, C), uint8 or `computable`.
            mask_indices: from the method's mask sampler.
        """

    @abstractmethod
    def reconstruct(self, images: Tensor, mask_indices: MaskIndices) -> dict[str, Tensor]:
        """Images for display, by name: (B, H, W, 3) uint8; sizes may differ between names."""

    def draw_whole_images(self, images: Tensor, masked: Tensor, prediction: Tensor) -> dict[str, Tensor]:
        """The result of `reconstruct` for methods that mask whole images, not windows.

        Args:
            images: (B, H, W, C).
            masked: (B, M) grid positions.
            prediction: (B, M, num_outputs) for these patches.

        Returns:
            `original`, `masked` and the target's renderings, (B, H, W, 3) uint8.
        """
        patches = patchify(images, self.encoder.patch_size)
        truth = gather_tokens(self.target.ground_truth(images, patches), masked)
        predicted = self.target.render(prediction, truth)
        shown, pixels = show_patches(patches, self.encoder.pixels), show_patches(images, self.encoder.pixels)
        return {"original": pixels, **render_predictions(shown, masked, predicted, self.encoder.grid)}


class LossAndTokens(NamedTuple):
    """The results of a batch that LUT needs."""

    losses: dict[str, Tensor]  # of the predicted images: scalar `loss`, and other values to log, detached
    visible_tokens: Tensor  # (B, V, D) encoded visible tokens of all images
    positions: Tensor  # (B, V) grid positions of these tokens in the image


class LUTMethod(Method):
    """A method that supports LUT.

    Attributes:
        mask_grid: rows and columns of patches that share a mask: those of the image, or of a window.
        mask_cell: side, in patches, of the squares that are masked together.
        pr_mim: PR-MIM's settings, if it is used.
    """

    mask_grid: Grid
    mask_cell: int = 1
    pr_mim: PRMIMConfig | None

    def forward(self, images: Tensor, mask_indices: MaskIndices) -> dict[str, Tensor]:
        return self.compute_loss(images, mask_indices).losses

    @abstractmethod
    def compute_loss(
        self, images: Tensor, mask_indices: MaskIndices, num_predicted: int | None = None
    ) -> LossAndTokens:
        """The loss of the first `num_predicted` images (default: all), and the encoded visible tokens of all."""
