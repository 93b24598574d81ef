"""LoMaR: local masked reconstruction (Chen et al., section 3.2).

Each image has W random windows of K x K patches; in each, a share of the patches is masked and predicted from the
visible ones. Windows never attend to each other: they are a batch dimension. Every image draws its own W distinct
windows (the authors' code draws windows once per batch, and assigns them so that an image gets one window W times:
`window_sampling=same`).

With a tokenizer's codes as the target and `mask_type=block` this is section 4.2's LoMaR + BEiT. Fig. 5's asymmetric
architecture is MAE's, applied to windows: the mask tokens are in a decoder, not in the encoder. With `decoder=cross` it
is CrossMAE's. The multiscale one is LocalMIM's: a decoder behind each of several blocks, for histograms of oriented
gradients (HOG) of another size.

Shapes: B images, G = B*W windows, L = K*K patches of a window, M of them masked, D width, P = p*p*3.
"""

import functools
import math
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.methods.base import LossAndTokens, LUTMethod, MaskIndices, MaskSampler, MethodConfig
from pretrain.methods.decoders import DecoderConfig, predict_all
from pretrain.methods.masking import (
    Grid,
    block_masked,
    check_masked,
    check_random_masks,
    check_windows,
    complementary_masked,
    count_places,
    random_masked,
    random_windows,
)
from pretrain.methods.multiscale import MultiscalePredictor, check_blocks, check_cells
from pretrain.methods.pr_mim import PRMIMConfig, build_mask_indices
from pretrain.methods.predictor import AsymmetricPredictor, Predictor, check_mask_token_block
from pretrain.methods.targets import PatchTarget, TargetConfig
from pretrain.models.patches import (
    cut_windows,
    frame_windows,
    gather_tokens,
    patchify,
    render_predictions,
    unpatchify,
)
from pretrain.models.vit import ARCHS, Arch, ViT
from pretrain.trainer.config import ModelConfig


def sample_masks(
    rng: np.random.Generator, *, grid: Grid, config: "LoMaR.Config", pr_mim: PRMIMConfig | None
) -> dict[str, np.ndarray]:
    """The random windows and masks of one sample.

    Returns:
        `positions` (W, L): the grid position in the image of each patch of each window; `visible` (W, L-M), `masked`
        (W, M) and of those `kept` (W, K): positions within the window, ascending. All int64.
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

    class Config(DecoderConfig):
        """LoMaR's own keys, and those of the asymmetric architecture's decoder."""

        name: Literal["lomar"] = "lomar"
        num_windows: int = Field(4, ge=1, description="windows per image, W: 4 at 224, 6 at 384, 9 at 448")
        window_size: int = Field(7, ge=2, description="side of a window in patches, K")
        window_sampling: Literal["distinct", "same", "complementary"] = Field(
            "distinct",
            description="W windows, or one window under W masks: independent ones, or ones that show different patches",
        )
        mask_type: Literal["random", "block"] = Field("random", description="block: BEiT's masks, in each window")
        mask_ratio: float = Field(0.8, gt=0, lt=1, description="share of a window's patches that is predicted")
        architecture: Literal["simple", "asymmetric", "multiscale"] = Field(
            "simple",
            description="mask tokens in the encoder or, as in MAE, in a decoder, which is all that `decoder*` change; "
            "multiscale: in a decoder behind each of `blocks`, as in LocalMIM",
        )
        blocks: tuple[int, ...] | None = Field(
            None, description="of architecture=multiscale: where target.cell_sizes are predicted; 1 is the first block"
        )
        decoder: Literal["transformer", "cross"] = Field("transformer", description="cross: CrossMAE's")
        mask_token_block: int = Field(
            0, ge=0, description="block before which mask tokens enter; earlier blocks see visible patches only"
        )

        @property
        def num_masked(self) -> int:
            """floor(K*K*ratio), M."""
            return int(self.window_size**2 * self.mask_ratio)

        def count_patches(self, grid: Grid, patch_size: int) -> tuple[int, int]:
            return self.window_size**2, self.num_masked

        def on_grid(self, grid: Grid, final: Grid) -> MethodConfig:
            """As many windows for each patch of the image, which is what they cost; not more than there are places."""
            windows = int(self.num_windows * math.prod(grid) / math.prod(final) + 0.5)
            if self.window_sampling == "distinct":
                windows = min(windows, count_places(self.window_size, grid))
            return self.model_copy(update={"num_windows": max(windows, 1)})

        def sequence_grid(self, grid: Grid) -> Grid:
            return self.window_size, self.window_size

        def check(self, grid: Grid, model: ModelConfig) -> None:
            if model.position == "bias":
                raise ValueError(
                    "model.position=bias has a number for each offset in the image, of which method lomar's windows "
                    "would train the short ones only: set model.position=relative"
                )
            check_windows(self.num_windows if self.window_sampling == "distinct" else 1, self.window_size, grid)
            if self.window_sampling == "complementary" and self.mask_type != "random":
                raise ValueError(
                    f"method.window_sampling=complementary draws the masks of a window together, and method.mask_type="
                    f"{self.mask_type} each by itself: set method.mask_type=random"
                )
            check_masked(self.mask_ratio, self.num_masked, self.window_size**2, "a window's")
            check_mask_token_block(self.mask_token_block, model)
            self.check_decoder(self.window_size**2, self.num_masked)
            self._check_architecture(model)

        def _check_architecture(self, model: ModelConfig) -> None:
            if self.architecture != "asymmetric" and self.decoder == "cross":
                raise ValueError(
                    f"method.decoder=cross is behind the encoder, and method.architecture={self.architecture} "
                    f"has no such decoder: set method.architecture=asymmetric"
                )
            if self.architecture == "simple" and self.predict_ratio is not None:
                raise ValueError(
                    f"method.predict_ratio={self.predict_ratio} is for mask tokens in a decoder, and "
                    f"method.architecture=simple has them in the encoder: set method.architecture=asymmetric"
                )
            if self.mask_token_block and self.architecture != "simple":
                raise ValueError(
                    f"method.mask_token_block={self.mask_token_block} lets mask tokens enter the encoder, and "
                    f"method.architecture={self.architecture} never does: set method.mask_token_block=0"
                )
            if (self.blocks is None) != (self.architecture != "multiscale"):
                blocks, depth = self.blocks and list(self.blocks), ARCHS[model.arch].depth
                raise ValueError(
                    f"method.architecture={self.architecture} with method.blocks={blocks}: set both, for example to "
                    f"multiscale and [2, 4, {depth}], or neither"
                )
            if self.blocks is not None:
                check_blocks(self.blocks, model)

        def check_target(self, target: TargetConfig, patch_size: int) -> None:
            if self.blocks is not None:
                check_cells(self.blocks, target, patch_size, whole_image=False)

        def check_lut(self) -> None:
            check_random_masks(self.mask_type)

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
        loss = self.target.loss(prediction, truth)
        return LossAndTokens(loss, visible_tokens.reshape(B, -1, visible_tokens.shape[-1]), positions.view(B, -1))

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
            `original` and `framed`, with the window's frame, (B, H, W, 3), and `window`, `masked` and the target's
            renderings of the window, (B, K*p, K*p, 3); uint8.
        """
        first = {name: array[:, :1] for name, array in mask_indices.items()}
        first = predict_all(self.config, first, self.config.window_size**2)
        patches = patchify(images, self.encoder.patch_size)
        windows, indices = cut_windows(patches, first)
        prediction, _ = self._predict(windows, indices)
        predicted = self.target.render(prediction, self._truth(images, patches, first))
        return {
            "original": images,
            "framed": frame_windows(images, first["positions"][:, 0], self.encoder.grid, self.encoder.patch_size),
            "window": unpatchify(windows, self.mask_grid),
            **render_predictions(windows, indices["masked"], predicted, self.mask_grid),
        }
