"""LC-MAE (Yue et al.): MAE's reconstruction with its implicit contrastive terms made explicit.

Each image passes through the same MAE under two masks. In addition to the reconstruction, the two predictions of a
patch masked in both should agree (cross-view), and the predictions of two patches should be as similar as the patches
themselves (in-view).

Shapes: B images, N patches of an image, M of them masked, V visible, P = p*p*3, E width of the projected vectors v.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pretrain.methods.base import MaskIndices
from pretrain.methods.mae import MAE
from pretrain.methods.mae_config import MAEConfig
from pretrain.methods.masking import Grid
from pretrain.methods.pr_mim import PRMIMConfig
from pretrain.methods.targets import PatchTarget
from pretrain.models.patches import gather_tokens, normalize_pixels, patchify
from pretrain.models.vit import ViT, init_weights
from pretrain.trainer.config import ModelConfig


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """(B, M, E) and (B, K, E) -> (B, M, K): the cosine of every pair of vectors of an image."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(1, 2)


def cross_view_loss(v1: Tensor, v2: Tensor, masked1: Tensor, masked2: Tensor) -> Tensor:
    """Eq. 5: 1 - cos(v_i^m1, v_i^m2), averaged over the patches that are masked twice, then over images.

    Every image has the same weight, however many patches its masks share, so a batch can be split in any way. If the
    masks share none (impossible when more than half is masked), the image adds zero.

    Args:
        v1, v2: (B, M, E) fp32.
        masked1, masked2: (B, M) grid positions.
    """
    same = masked1.unsqueeze(2) == masked2.unsqueeze(1)
    distance = ((1 - cosines(v1, v2)) * same).sum((1, 2))
    return (distance / same.sum((1, 2)).clamp(min=1)).mean()


def in_view_loss(v: Tensor, x: Tensor) -> Tensor:
    """Eq. 6: |cos(v_i, v_j) - cos(x_i, x_j)|, averaged over pairs i != j of masked patches of one view.

    Args:
        v: (B, M, E) fp32.
        x: (B, M, P) fp32, the pixels as the encoder gets them, not normalized per patch.
    """
    pairs = v.shape[1] * (v.shape[1] - 1) / 2
    difference = (cosines(v, v) - cosines(x, x)).abs().triu(1)  # i < j: the matrix is symmetric
    return difference.sum((1, 2)).mean() / pairs


class LCMAE(MAE):
    """w_mae * L_MAE + w_cross * L_cross + w_in * L_in; the first and the last are averaged over the two views."""

    add_ons = frozenset({"pr_mim"})

    class Config(MAEConfig):
        """MAE's keys with a decoder of two blocks, the weights of the three losses, and the projector.

        Table 1's settings of `w_mae`, `w_cross`, `w_in` are (a) 1 1 1, (b) 1 0 0, (c) 0 1 0, (d) 0 0 1, (e) 1 1 0,
        (f) 1 0 1, (g) 0 1 1. All use two masks per image. Table 2's decoders are values of `decoder`.
        """

        name: Literal["lc_mae"] = "lc_mae"
        num_masks: Literal[2] = Field(2, description="masks per image, whose predictions are compared")
        decoder_depth: int = Field(2, ge=1, description="blocks of the decoder")
        w_mae: float = Field(1.0, ge=0, description="weight of the reconstruction loss")
        w_cross: float = Field(1.0, ge=0, description="weight of the cross-view loss")
        w_in: float = Field(1.0, ge=0, description="weight of the in-view loss")
        proj_dim: int = Field(1024, ge=1, description="width of the vectors that the last two losses compare")

        def check(self, grid: Grid, model: ModelConfig) -> None:
            super().check(grid, model)
            if not self.w_mae + self.w_cross + self.w_in:
                raise ValueError("method.w_mae, method.w_cross and method.w_in are all 0: nothing is learned")
            patches, masked = self.count_patches(grid, model.patch_size)
            if self.w_in and (self.num_predicted(patches) or masked) < 2:
                key = "mask_ratio" if self.predict_ratio is None else "predict_ratio"
                raise ValueError(
                    f"method.w_in={self.w_in:g} compares pairs of predicted patches, but there is only one: "
                    f"raise method.{key}={getattr(self, key)}"
                )
            if self.w_cross and self.mask_type == "grid":
                raise ValueError(
                    f"method.w_cross={self.w_cross:g} compares an image under two masks, but with "
                    f"method.mask_type=grid both are the same: set method.mask_type=random"
                )

    config: Config

    def __init__(self, config: Config, encoder: ViT, target: PatchTarget, pr_mim: PRMIMConfig | None = None):
        super().__init__(config, encoder, target, pr_mim)
        self.proj = None
        if config.w_cross or config.w_in:
            self.proj = nn.Linear(target.num_outputs, config.proj_dim)
            init_weights(self.proj)

    def forward(self, images: Tensor, mask_indices: MaskIndices) -> dict[str, Tensor]:
        """The loss of a batch and its terms with non-zero weight, detached and unweighted: `loss_mae` and so on.

        Args:
            images: (B, H, W, C).
            mask_indices: (B, 2, V), (B, 2, M) and (B, 2, K).
        """
        patches = patchify(images, self.encoder.patch_size)
        views, both, truth = self._by_mask(mask_indices, patches, self.target.ground_truth(images, patches))
        masked = views["masked"]
        prediction = self._predict(both, **views)  # (2B, M, num_outputs)
        masked_patches, truth = gather_tokens(both, masked), gather_tokens(truth, masked)
        v = None if self.proj is None else self.proj(prediction).float()  # eq. 5 and 6: v = p(h(x, m))
        with torch.autocast(images.device.type, enabled=False):  # cosines are matrix products, which bf16 would round
            terms = self._losses(prediction, v, truth, masked_patches, masked)
        loss = sum(getattr(self.config, f"w_{name}") * term for name, term in terms.items())
        return {"loss": loss, **{f"loss_{name}": term.detach() for name, term in terms.items()}}

    def _losses(
        self, prediction: Tensor, v: Tensor | None, truth: Tensor, masked_patches: Tensor, masked: Tensor
    ) -> dict[str, Tensor]:
        """The terms with non-zero weight; the two views of an image are adjacent."""
        config, terms = self.config, {}
        if config.w_mae:
            terms["mae"] = self.target.loss(prediction, truth)
        if v is not None and config.w_cross:
            terms["cross"] = cross_view_loss(v[::2], v[1::2], masked[::2], masked[1::2])
        if v is not None and config.w_in:
            terms["in"] = in_view_loss(v, normalize_pixels(masked_patches, self.encoder.pixels))
        return terms
