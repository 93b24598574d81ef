"""LUT, an add-on: the visible tokens learn the context of the whole image (Kim et al., section 3).

Two views of an image pass through the same method with disjoint sets of visible patches. The mean of a view's encoded
visible tokens is trained to predict the features that a momentum encoder computes from *all* patches of the other view.
The method's own target is predicted in the first view only; the second view also gets color augmentations.

Shapes: B images, N patches, V visible ones, D width. Views are given as (B, 2, ...) and encoded as (2B, ...),
all first views before all second views.
"""

import copy
import functools
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from data.draw import uniforms
from pretrain.methods.base import LossAndTokens, LUTMethod, MaskIndices, MaskSampler
from pretrain.methods.masking import Grid
from pretrain.methods.pr_mim import PRMIMConfig, build_mask_indices
from pretrain.models.heads import mlp_head
from pretrain.models.patches import gather_tokens, patchify
from pretrain.models.vit import ViT
from pretrain.trainer.ema import EMA
from pretrain.trainer.schema import Section


class LUTConfig(Section):
    """The add-on's keys; Table 4's ablations change these, `data.crop` and `method.mask_ratio`."""

    alpha: float = Field(0.25, gt=0, description="weight of the context loss: 1.0 for ViT-S, 0.25 for ViT-B and L")
    loss: Literal["cosine", "infonce", "smooth_l1"] = Field("cosine", description="the context loss (Table 4d)")
    temperature: float = Field(0.2, gt=0, description="temperature of infonce")
    supervision: Literal["pooled", "tokens"] = Field(
        "pooled",
        description="pooled: the mean of the visible tokens; tokens: each against the same position in the other view",
    )
    momentum: float = Field(0.996, ge=0, le=1, description="momentum of the teacher at the start; rises along a cosine")
    final_momentum: float = Field(1.0, ge=0, le=1, description="momentum of the teacher at the end")
    hidden_dim: int = Field(4096, ge=1, description="width of the heads' hidden layer")
    color_jitter: float = Field(0.8, ge=0, le=1, description="probability of changing the second view's colors")
    three_augment: bool = Field(True, description="grayscale, solarize or blur the second view")

    def check(self, patches: int, masked: int, micro_batch: int) -> None:
        """Raises ValueError if two disjoint sets of visible patches do not fit, or keys cannot be combined."""
        visible = patches - masked
        if 2 * visible > patches:
            raise ValueError(
                f"lut needs two disjoint sets of visible patches, but 2 x {visible} is more than {patches}: "
                f"set method.mask_ratio to at least 0.5"
            )
        if self.loss == "infonce" and self.supervision == "tokens":
            raise ValueError("lut.loss=infonce compares images, not tokens: set lut.supervision=pooled")
        if micro_batch < 2:
            raise ValueError(
                "lut normalizes over the micro-batch of all ranks, which is a single image: raise "
                "train.global_batch_size or lower train.gradient_accumulation_steps"
            )


def disjoint_mask(rng: np.random.Generator, masked: np.ndarray, grid: Grid, cell: int) -> np.ndarray:
    """A mask with as many visible patches as another, and none in common.

    Together the two are disjoint slices of one permutation, as in the authors' code.

    Args:
        masked: (R, N) bool, in which squares of `cell` x `cell` patches are entirely masked or entirely visible.

    Returns:
        (R, N) bool.
    """
    rows, cols = grid[0] // cell, grid[1] // cell
    masked_cells = masked.reshape(-1, rows, cell, cols, cell)[:, :, 0, :, 0].reshape(-1, rows * cols)
    order = np.where(masked_cells, uniforms(rng, masked_cells.shape), 2.0).argsort(axis=1)
    num_visible = int((~masked_cells[0]).sum())
    other = np.ones_like(masked_cells)
    np.put_along_axis(other, order[:, :num_visible], False, axis=1)
    return other.reshape(-1, rows, cols).repeat(cell, axis=1).repeat(cell, axis=2).reshape(masked.shape)


def sample_masks(
    rng: np.random.Generator, *, first: MaskSampler, grid: Grid, cell: int, pr_mim: PRMIMConfig | None
) -> dict[str, np.ndarray]:
    """Indices of both views, (2, ...) each: the method's own, and others with disjoint visible patches."""
    one = first(rng)
    masked = np.ones((one["visible"].size // one["visible"].shape[-1], grid[0] * grid[1]), dtype=bool)
    np.put_along_axis(masked, np.atleast_2d(one["visible"]), False, axis=1)
    other = build_mask_indices(rng, disjoint_mask(rng, masked, grid, cell), pr_mim, grid[1])
    # If only part of the masked patches is predicted, the second view, which predicts none, gets as many indices.
    other = {name: array[:, : one[name].shape[-1]].reshape(one[name].shape) for name, array in other.items()}
    two = one | other
    return {name: np.stack([one[name], two[name]]) for name in one}


class TeacherModel(nn.Module):
    """The momentum encoder with its projector, applied to whole views."""

    position: Tensor

    def __init__(self, encoder: ViT, projector: nn.Module, pooled: bool):
        super().__init__()
        self.encoder, self.projector, self.pooled = encoder, projector, pooled
        self.register_buffer("position", encoder.grid_position(), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 2, H, W, 3) uint8 -> pooled features (2B, 1, D), or those of each token (2B, N, D); fp32."""
        patches = patchify(images.transpose(0, 1).flatten(0, 1), self.encoder.patch_size)
        encoded = self.encoder(self.encoder.patch_embed(patches), self.position)[:, self.encoder.num_prefix_tokens :]
        features = encoded.mean(1, keepdim=True) if self.pooled else encoded
        return self.projector(features.flatten(0, 1)).float().view_as(features)


class LUT(nn.Module):
    """L = L_method + alpha * L_context (eq. 3) around a method."""

    def __init__(self, config: LUTConfig, method: LUTMethod):
        super().__init__()
        self.config, self.method = config, method
        dim = method.encoder.arch.dim
        self.projector, self.predictor = mlp_head(dim, config.hidden_dim), mlp_head(dim, config.hidden_dim)

    @property
    def encoder(self) -> ViT:
        return self.method.encoder

    def mask_sampler(self) -> MaskSampler:
        """Like `Method.mask_sampler`, for two views."""
        method = self.method
        return functools.partial(
            sample_masks,
            first=method.mask_sampler(),
            grid=method.mask_grid,
            cell=method.mask_cell,
            pr_mim=method.pr_mim,
        )

    def teacher_model(self) -> TeacherModel:
        """The teacher: a copy of `averaged_modules`."""
        encoder, projector = copy.deepcopy(self.encoder), copy.deepcopy(self.projector)
        return TeacherModel(encoder, projector, self.config.supervision == "pooled")

    def averaged_modules(self) -> list[nn.Module]:
        """The modules that the teacher averages, in the order of `teacher_model`'s."""
        return [self.encoder, self.projector]

    def forward(self, images: Tensor, mask_indices: MaskIndices, teacher_features: Tensor) -> dict[str, Tensor]:
        """The loss of a batch and its terms, detached and unweighted: `loss_mim`, the method's, and `loss_context`.

        Args:
            images: (B, 2, H, W, 3) uint8.
            mask_indices: (B, 2, ...) each.
            teacher_features: (2B, 1, D) or (2B, N, D), the teacher's features of the same images.
        """
        B = len(images)
        views = {name: array.transpose(0, 1).flatten(0, 1) for name, array in mask_indices.items()}
        output = self.method.compute_loss(images.transpose(0, 1).flatten(0, 1), views, num_predicted=B)
        context = self._context_loss(output, teacher_features, B)
        mim = output.losses["loss"]
        terms = {"loss_mim": mim.detach(), "loss_context": context.detach()}
        return output.losses | terms | {"loss": mim + self.config.alpha * context}

    def _context_loss(self, output: LossAndTokens, teacher_features: Tensor, B: int) -> Tensor:
        """The mean over both directions: a view's visible tokens against the teacher's features of the other view."""
        if self.config.supervision == "pooled":
            features = output.visible_tokens.mean(1, keepdim=True)
            other = teacher_features.roll(B, 0)
        else:
            features = output.visible_tokens
            other = gather_tokens(teacher_features.roll(B, 0), output.positions)
        terms = []
        for view in (slice(0, B), slice(B, 2 * B)):  # batch statistics of one view at a time, as in the authors' code
            predicted = self.predictor(self.projector(features[view].flatten(0, 1)))
            with torch.autocast(predicted.device.type, enabled=False):
                terms.append(self._distance(predicted.float(), other[view].flatten(0, 1)))
        return (terms[0] + terms[1]) / 2

    def _distance(self, predicted: Tensor, target: Tensor) -> Tensor:
        """(R, D) and (R, D) fp32 -> (): Table 4d's losses."""
        if self.config.loss == "smooth_l1":
            return F.smooth_l1_loss(predicted, target)
        predicted, target = F.normalize(predicted, dim=-1), F.normalize(target, dim=-1)
        if self.config.loss == "cosine":
            return (predicted - target).square().sum(-1).mean()
        all_targets, offset = _gather_over_ranks(target)
        positives = offset + torch.arange(len(predicted), device=predicted.device)
        return F.cross_entropy(predicted @ all_targets.T / self.config.temperature, positives)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask_indices: MaskIndices) -> dict[str, Tensor]:
        """The method's own reconstructions of the first view of each image."""
        first = {name: array[:, 0] for name, array in mask_indices.items()}
        return self.method.reconstruct(images[:, 0].contiguous(), first)


class Teacher(EMA):
    """The momentum encoder as a moving average; computes features of the images that the method trains on.

    Args:
        method: the one in training, not yet partitioned by ZeRO-3.
        device: the images' device.
        bf16: whether to compute under autocast, as the engine does.
    """

    def __init__(self, method: LUT, device: torch.device, bf16: bool):
        config = method.config
        super().__init__(
            method.teacher_model(), method.averaged_modules(), config.momentum, config.final_momentum, device
        )
        self.bf16 = bf16

    @torch.no_grad()
    def model_inputs(self, images: Tensor) -> dict[str, Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            return {"teacher_features": self.model(images)}


def _gather_over_ranks(vectors: Tensor) -> tuple[Tensor, int]:
    """The (R, D) vectors of all ranks, without gradients, and the index of this rank's first; R is equal on all."""
    if not dist.is_initialized():
        return vectors, 0
    parts = [torch.empty_like(vectors) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, vectors.contiguous())
    return torch.cat(parts), dist.get_rank() * len(vectors)
