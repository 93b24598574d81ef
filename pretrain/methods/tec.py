"""TEC, target-enhanced conditional reconstruction (Gao et al., arXiv:2210.11016): MAE that predicts a frozen teacher.

From the patches that the encoder sees, TEC predicts the features and the attention of a teacher that sees the whole
image. Features are predicted at the masked patches. Of the attention in the teacher's last block, TEC predicts the rows
of the class token and of the patches that it attends to most, over all patches, masked or not (section 3.1). Two
adapters condition the encoder on the teacher (section 3.2). The class token goes through an MLP before it enters; both
are folded into a constant when the encoder is exported. The outputs of all blocks are joined before the decoder. The
decoder is shallow, and its blocks are shared by both targets.

Shapes: B images, N patches, M of them masked, R = 1 + num_queries rows of attention, H heads of the teacher, D its
width.
"""

import functools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.layers import Mlp
from torch import Tensor

from pretrain.methods.base import MaskIndices, MaskSampler, Method, MethodConfig
from pretrain.methods.mae_config import check_absolute
from pretrain.methods.masking import Grid, check_masked, count_masked
from pretrain.methods.pr_mim import PRMIMConfig, build_aggregation, sample_random_mask
from pretrain.methods.targets import PatchTarget, TeacherConfig
from pretrain.methods.targets.features import ClassAttention, EncoderTeacher, FeatureTarget
from pretrain.models.conditional import EncoderAdapter, SharedDecoder
from pretrain.models.decoder import check_heads
from pretrain.models.patches import gather_tokens, patchify
from pretrain.models.vit import Arch, ViT, init_weights
from pretrain.trainer.config import ModelConfig


def attention_loss(queries_keys: Tensor, rows: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the predicted attention with the teacher's, averaged over images, rows and heads.

    The predicted logits are scaled by D^-0.5, as in the authors' code, not by the width of a head.

    Args:
        queries_keys: (B, 1+N, 2D), predicted for the class token and all patches.
        rows: (B, R-1) the patches whose attention is predicted besides the class token's.
        logits: (B, H, R, N) fp32, the teacher's before the softmax.
        temperature: divides the teacher's logits.
    """
    B, length, width = queries_keys.shape
    heads = logits.shape[1]
    queries, keys = queries_keys.float().view(B, length, 2, heads, width // 2 // heads).permute(2, 0, 3, 1, 4)
    index = F.pad(1 + rows, (1, 0))[:, None, :, None].expand(-1, heads, -1, queries.shape[-1])
    with torch.autocast(logits.device.type, enabled=False):
        predicted = queries.gather(2, index) @ keys[:, :, 1:].transpose(2, 3) * (width // 2) ** -0.5
    return -((logits / temperature).softmax(-1) * predicted.log_softmax(-1)).sum(-1).mean()


class TEC(Method):
    """MAE's encoder with adapters, and a shallow decoder for features and attention."""

    add_ons = frozenset({"pr_mim"})
    targets = frozenset({"teacher"})
    default_target = TeacherConfig()

    target: FeatureTarget

    class Config(MethodConfig):
        """TEC's own keys; the teacher is part of `target`."""

        name: Literal["tec"] = "tec"
        mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of the patches whose features are predicted")
        attention_weight: float = Field(1.0, ge=0, description="weight of the attention loss; 0: features alone")
        num_queries: int = Field(15, ge=1, description="patches whose attention rows are predicted; iBOT: 9")
        temperature: float = Field(
            1.8, gt=0, description="softmax temperature of the teacher's attention; ViT-L: 1.4, iBOT: 1.0"
        )
        decoder_embed_dim: int = Field(512, ge=4, multiple_of=4, description="width of the decoder; ViT-L: 768")
        decoder_depth: int = Field(2, ge=1, description="blocks of the decoder")
        decoder_num_heads: int = Field(16, ge=1, description="heads of the decoder's attention")

        def count_patches(self, grid: Grid, patch_size: int) -> tuple[int, int]:
            return math.prod(grid), count_masked(math.prod(grid), self.mask_ratio)

        def check(self, grid: Grid, model: ModelConfig) -> None:
            check_absolute(model.position, self.name)
            patches, masked = self.count_patches(grid, model.patch_size)
            check_masked(self.mask_ratio, masked, patches, "the image's")
            check_heads(self.decoder_embed_dim, self.decoder_num_heads)
            if self.num_queries > patches:
                raise ValueError(
                    f"method.num_queries={self.num_queries}, but an image has {patches} patches: set "
                    f"method.num_queries to at most {patches}"
                )

    def __init__(self, config: Config, encoder: ViT, target: PatchTarget, pr_mim: PRMIMConfig | None = None):
        super().__init__(config, encoder, target, pr_mim)
        assert isinstance(target, FeatureTarget), "refused by the configuration"
        self.config, self.encoder, self.target, self.pr_mim = config, encoder, target, pr_mim
        dim, teacher, num_outputs = encoder.arch.dim, target.teacher, [target.num_outputs]
        if config.attention_weight:
            if not isinstance(teacher, EncoderTeacher) or not teacher.encoder.absolute:
                raise ValueError(
                    f"method.attention_weight={config.attention_weight:g} needs a teacher that has absolute positions "
                    f"and is loaded without target.timm_model: set method.attention_weight=0"
                )
            teacher.class_attention = ClassAttention(teacher.encoder)
            num_outputs.append(2 * teacher.dim)
        encoder.class_adapter = Mlp(dim, 4 * dim).apply(init_weights)
        arch = Arch(config.decoder_embed_dim, config.decoder_depth, config.decoder_num_heads)
        self.adapter = EncoderAdapter(dim, encoder.arch.depth, 4 * arch.dim)
        aggregations = [build_aggregation(pr_mim, arch, encoder.grid) for _ in num_outputs]
        self.decoder = SharedDecoder(dim, arch, encoder.grid, num_outputs, aggregations, encoder.num_prefix_tokens)

    def mask_sampler(self) -> MaskSampler:
        grid = self.encoder.grid
        _, count = self.config.count_patches(grid, self.encoder.patch_size)
        return functools.partial(sample_random_mask, grid=grid, count=count, pr_mim=self.pr_mim)

    def forward(self, images: Tensor, mask_indices: MaskIndices) -> dict[str, Tensor]:
        """The loss of a batch and its terms, unweighted: `loss_features` and, if predicted, `loss_attention`."""
        patches, masked = patchify(images, self.encoder.patch_size), mask_indices["masked"]
        prediction, *queries_keys = self._predict(patches, **mask_indices)
        if not queries_keys:
            truth = self.target.ground_truth(images, patches)
            loss = self.target.loss(prediction, gather_tokens(truth, masked))
            return {"loss": loss, "loss_features": loss.detach()}
        truth, rows, logits = self.target.with_attention(images, self.config.num_queries)
        features = self.target.loss(prediction, gather_tokens(truth, masked))
        attention = attention_loss(queries_keys[0], rows, logits, self.config.temperature)
        loss = features + self.config.attention_weight * attention
        return {"loss": loss, "loss_features": features.detach(), "loss_attention": attention.detach()}

    def _predict(self, patches: Tensor, visible: Tensor, masked: Tensor, kept: Tensor) -> list[Tensor]:
        """(B, N, P) uint8 patches -> features of the masked ones (B, M, D), and queries and keys (B, 1+N, 2D)."""
        tokens = self.encoder.patch_embed(gather_tokens(patches, visible))
        *streams, last = self.encoder(tokens, visible, hidden=range(1, self.encoder.arch.depth + 1))
        encoded = self.adapter([*streams, self.encoder.norm(last)])
        return self.decoder(encoded, visible, kept, [masked, None][: len(self.decoder.exits)])

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask_indices: MaskIndices) -> dict[str, Tensor]:
        """`original`, `masked` and the features of each image in false colors, (B, H, W, 3) uint8."""
        prediction = self._predict(patchify(images, self.encoder.patch_size), **mask_indices)[0]
        return self.draw_whole_images(images, mask_indices["masked"], prediction)
