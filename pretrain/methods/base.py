"""The contract of a method: what the step loop, the data loader and the add-ons need of it.

Shapes: B images, N patches of an image, V of them visible, M masked, D the encoder's width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import numpy as np
from torch import Tensor, nn

from pretrain.methods.masking import Grid
from pretrain.methods.pr_mim import PRMIMConfig
from pretrain.methods.targets import PatchTarget, PixelsConfig, TargetConfig
from pretrain.models.vit import ViT
from pretrain.trainer.config import ModelConfig
from pretrain.trainer.schema import Section

MaskIndices = dict[str, Tensor]  # (B, ...) int64 each: the arrays of a mask sampler, stacked over images
MaskSampler = Callable[[np.random.Generator], dict[str, np.ndarray]]


class MethodConfig(Section):
    """The keys of a method; its `name` is a literal by which the method is chosen."""

    name: str

    def check(self, grid: Grid, model: ModelConfig) -> None:
        """Raises ValueError, naming the key to change, where the keys do not fit an image's grid or the encoder."""

    def count_patches(self, grid: Grid, patch_size: int) -> tuple[int, int]:
        """Patches that are encoded together (of an image, or of a window), and how many of them are masked."""
        raise NotImplementedError

    def check_pr_mim(self) -> None:
        """Raises ValueError where these keys leave PR-MIM nothing to do."""

    def check_lut(self) -> None:
        """Raises ValueError where these keys do not go with LUT."""


class Method(nn.Module, ABC):
    """Owns encoder, predictor and loss. Parameters are used only inside the `forward` of the module that owns them.

    Attributes:
        add_ons: names of the add-ons that the method is defined for.
        targets: names of the targets that it can predict.
        default_target: what it predicts where no target is named.
        encoder: what all this is for.
    """

    Config: ClassVar[type[MethodConfig]]
    add_ons: ClassVar[frozenset[str]] = frozenset()
    targets: ClassVar[frozenset[str]] = frozenset({"pixels", "pca", "tokens"})
    default_target: ClassVar[TargetConfig] = PixelsConfig(norm_pix=True)

    encoder: ViT

    @abstractmethod
    def __init__(self, config: MethodConfig, encoder: ViT, target: PatchTarget, pr_mim: PRMIMConfig | None = None):
        super().__init__()

    @abstractmethod
    def mask_sampler(self) -> MaskSampler:
        """A picklable function that draws one sample's mask indices; the data workers call it."""

    @abstractmethod
    def forward(self, images: Tensor, mask_indices: MaskIndices) -> dict[str, Tensor]:
        """(B, H, W, 3) uint8 images -> the batch's `loss`, and detached terms of it under names of their own."""

    @abstractmethod
    def reconstruct(self, images: Tensor, mask_indices: MaskIndices) -> dict[str, Tensor]:
        """Images to look at, by name: (B, H, W, 3) uint8; sizes may differ from name to name."""


class LossAndTokens(NamedTuple):
    """What a method computes of a batch, for LUT."""

    loss: Tensor  # () of the images that are predicted
    visible_tokens: Tensor  # (B, V, D) encoded visible tokens of all images
    positions: Tensor  # (B, V) grid position in the image of each


class ContextMethod(Method):
    """A method that LUT can be added to.

    Attributes:
        mask_grid: rows and columns of what is masked as one: the image's grid of patches, or a window's.
        mask_cell: side, in patches, of the squares that are masked together.
        pr_mim: the settings of that add-on.
    """

    mask_grid: Grid
    mask_cell: int = 1
    pr_mim: PRMIMConfig | None

    def forward(self, images: Tensor, mask_indices: MaskIndices) -> dict[str, Tensor]:
        return {"loss": self.compute_loss(images, mask_indices).loss}

    @abstractmethod
    def compute_loss(
        self, images: Tensor, mask_indices: MaskIndices, num_predicted: int | None = None
    ) -> LossAndTokens:
        """The loss of the first `num_predicted` images, of all unless given, and all encoded visible tokens."""
