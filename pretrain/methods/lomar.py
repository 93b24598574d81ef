"""LoMaR: local masked reconstruction (Chen et al., section 3.2).

Each image has W random windows of K x K patches; in each, a share of the patches is masked and predicted from the
visible ones. Windows never attend to each other: they are a batch dimension. Every image draws its own W distinct
windows (the authors' code draws windows once per batch, and assigns them so that an image gets one window W times:
`window_sampling=same`).

With a tokenizer's codes as the target and `mask_type=block` this is section 4.2's LoMaR + BEiT. Fig. 5's asymmetric
architecture is MAE's, applied to windows: the mask tokens are in a decoder, not in the encoder. With `decoder=cross` it
is CrossMAE's. The multiscale one is LocalMIM's: a decoder behind each of several blocks, each for histograms of
oriented gradients (HOG) of its own cell size.

Shapes: B images, G = B*W windows, L = K*K patches of a window, M of them masked, D width, P = p*p*3.
"""

import functools
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.methods.base import LossAndTokens, LUTMethod, MaskIndices, MaskSampler
from pretrain.methods.decoders import predict_all
from pretrain.methods.lomar_config import LoMaRConfig
from pretrain.methods.masking import Grid, block_masked, complementary_masked, random_masked, random_windows
from pretrain.methods.multiscale import MultiscalePredictor
from pretrain.methods.pr_mim import PRMIMConfig, build_mask_indices
from pretrain.methods.predictor import AsymmetricPredictor, Predictor
from pretrain.methods.targets import PatchTarget
from pretrain.models.patches import (
    cut_windows,
    frame_windows,
    gather_tokens,
    patchify,
    render_predictions,
    show_patches,
    unpatchify,
)
from pretrain.models.vit import Arch, ViT


def sample_masks(
    rng: np.random.Generator, *, grid: Grid, config: LoMaRConfig, pr_mim: PRMIMConfig | None
) -> dict[str, np.ndarray]:
    """The random windows and masks of one sample.

    Returns:
        `positions` (W, L): the grid position in the image of each patch of each window; `visible` (W, L-M), `masked`
        (W, M) and its subset `kept` (W, K): positions within the window, ascending. All int64.
    """
    one = config.window_sampling != "distinct"
    positions = random_windows(rng, 1 if one else config.num_windows, config.window_size, grid)
    positions = positions.repeat(config.num_windows if one else 1, axis=0)
    window = (config.window_size, config.window_size)
    if config.window_sampling == "complementary":
        masked = complementary_masked(rng, config.num_windows, config.window_size**2, config.num_masked)
    elif config.mask_type == "block":
        masked = np.stack([block_masked(rng, window, config.num_masked) for _ in positions])
    else:
        masked = random_masked(rng, config.num_windows, config.window_size**2, config.num_masked)
    predicted = config.num_predicted(config.window_size**2)
    return {"positions": positions, **build_mask_indices(rng, masked, pr_mim, config.window_size, predicted)}


class LoMaR(LUTMethod):
    """Encoder on windows with mask tokens and a linear head, or with a decoder; loss on the masked patches."""

    add_ons = frozenset({"pr_mim", "lut"})

    class Config(LoMaRConfig):
        """LoMaR's own keys, and those of the decoders that every architecture but `simple` has."""

        name: Literal["lomar"] = "lomar"

    def __init__(self, config: Config, encoder: ViT, target: PatchTarget, pr_mim: PRMIMConfig | None = None):
        super().__init__(config, encoder, target, pr_mim)
        self.config, self.encoder, self.target, self.pr_mim = config, encoder, target, pr_mim
        self.mask_grid = (config.window_size, config.window_size)
        if config.architecture == "simple":
            self.predictor: nn.Module = Predictor(
                encoder, self.mask_grid, target.num_outputs, config.mask_token_block, pr_mim
            )
        elif config.blocks is not None:
            arch = Arch(config.decoder_embed_dim, config.decoder_depth, config.decoder_num_heads)
            self.predictor = MultiscalePredictor(encoder, self.mask_grid, target, config.blocks, arch, pr_mim)
        else:
            self.predictor = AsymmetricPredictor(encoder, self.mask_grid, target.num_outputs, config, pr_mim)

    def mask_sampler(self) -> MaskSampler:
        return functools.partial(sample_masks, grid=self.encoder.grid, config=self.config, pr_mim=self.pr_mim)

    def compute_loss(
        self, images: Tensor, mask_indices: MaskIndices, num_predicted: int | None = None
    ) -> LossAndTokens:
        B, patches = len(images), patchify(images, self.encoder.patch_size)
        windows, indices = cut_windows(patches, mask_indices)
        num_windows = None if num_predicted is None else num_predicted * self.config.num_windows
        prediction, visible_tokens = self._predict(windows, indices, num_windows)
        truth = self._truth(images[:num_predicted], patches[:num_predicted], mask_indices)
        positions = indices["positions"].gather(1, indices["visible"])
        losses = self.target.losses(prediction, truth)
        return LossAndTokens(losses, visible_tokens.reshape(B, -1, visible_tokens.shape[-1]), positions.view(B, -1))

    def _predict(
        self, windows: Tensor, indices: MaskIndices, num_predicted: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(G, L, P) uint8 patches -> the results of `Predictor`."""
        visible = gather_tokens(windows, indices["visible"])
        return self.predictor(self.encoder, visible, **indices, num_predicted=num_predicted)

    def _truth(self, images: Tensor, patches: Tensor, mask_indices: MaskIndices) -> Tensor:
        """The target of the masked patches in the windows of B images: (B*W, M, ...)."""
        B = len(images)
        positions = mask_indices["positions"][:B].gather(2, mask_indices["masked"][:B])
        truth = gather_tokens(self.target.ground_truth(images, patches), positions.flatten(1))
        return truth.view(-1, positions.shape[-1], truth.shape[-1])

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask_indices: MaskIndices) -> dict[str, Tensor]:
        """The paper's Fig. 7 for the first window of each image.

        Returns:
            `original` and `framed`, with a frame around the window, (B, H, W, 3); `window`, `masked` and the target's
            renderings of the window, (B, K*p, K*p, 3). All uint8.
        """
        first = {name: array[:, :1] for name, array in mask_indices.items()}
        first = predict_all(self.config, first, self.config.window_size**2)
        patches = patchify(images, self.encoder.patch_size)
        windows, indices = cut_windows(patches, first)
        prediction, _ = self._predict(windows, indices)
        predicted = self.target.render(prediction, self._truth(images, patches, first))
        shown, windows = (show_patches(values, self.encoder.pixels) for values in (images, windows))
        return {
            "original": shown,
            "framed": frame_windows(shown, first["positions"][:, 0], self.encoder.grid, self.encoder.patch_size),
            "window": unpatchify(windows, self.mask_grid),
            **render_predictions(windows, indices["masked"], predicted, self.mask_grid),
        }
