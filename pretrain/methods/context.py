"""LUT: the visible tokens learn the context of the whole image (Kim et al., section 3), an add-on.

Two pictures of an image pass through the same method, showing it disjoint sets of patches. What became of a picture's
visible tokens, averaged, is to predict what a momentum encoder makes of *all* patches of the other picture. Pixels are
predicted of the first picture alone. The second one is also changed in colour.

Shapes: B images, N patches, V visible ones, D width. Pictures come as (B, 2, ...), and go through the encoder as (2B,
...), all first ones before all second ones.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pretrain.methods.masking import Grid
from pretrain.methods.partial import Partial, describe
from pretrain.methods.targets import normalize_pixels, patchify, take
from pretrain.models.attention import grid_buckets
from pretrain.models.heads import mlp_head
from pretrain.models.vit import ViT
from pretrain.schema import Section


class Learned(NamedTuple):
    """What a method made of a batch."""

    loss: Tensor  # () of the images that were to be predicted
    seen: Tensor  # (B, V, D) encoded visible tokens of all images
    place: Tensor  # (B, V) the image's grid position of each


class Context(Section):
    """The add-on's keys; Table 4's ablations are values of these, of `data.crop` and of `method.mask_ratio`."""

    alpha: float = Field(0.25, gt=0, description="weight of the context loss: 1.0 for ViT-S, 0.25 for ViT-B and L")
    loss: Literal["cosine", "infonce", "smooth_l1"] = "cosine"
    temperature: float = Field(0.2, gt=0, description="of infonce")
    supervision: Literal["pooled", "tokens"] = Field(
        "pooled", description="the mean of the visible tokens, or each against the same place of the other picture"
    )
    momentum: float = Field(0.996, ge=0, le=1, description="of the teacher at the start; follows a cosine")
    final_momentum: float = Field(1.0, ge=0, le=1, description="of the teacher at the end")
    hidden: int = Field(4096, ge=1, description="width of the heads' hidden layer")
    color_jitter: float = Field(0.8, ge=0, le=1, description="probability of changing the second picture's colours")
    three_augment: bool = Field(True, description="the second picture is made grey, solarised or blurred")

    def check(self, patches: int, masked: int, micro_batch: int) -> None:
        """Raises ValueError where two disjoint sets of visible patches do not fit, or keys do not go together."""
        visible = patches - masked
        if 2 * visible > patches:
            raise ValueError(
                f"context shows two disjoint sets of patches, and 2 x {visible} visible ones are more than {patches}: "
                f"set method.mask_ratio to at least 0.5"
            )
        if self.loss == "infonce" and self.supervision == "tokens":
            raise ValueError("context.loss=infonce compares images: set context.supervision=pooled")
        if micro_batch < 2:
            raise ValueError(
                "context normalises over the images of a micro-batch on all ranks, and there is one: raise train.batch "
                "or lower train.accumulation"
            )


def another_mask(rng: np.random.Generator, masked: np.ndarray, grid: Grid, unit: int) -> np.ndarray:
    """A mask that shows as many patches as another, and none of those.

    Together the two are disjoint slices of one permutation, as in the authors' code.

    Args:
        masked: (R, N) bool, where whole squares of `unit` x `unit` patches of a grid are masked or visible.

    Returns:
        (R, N) bool.
    """
    rows, cols = grid[0] // unit, grid[1] // unit
    hidden = masked.reshape(-1, rows, unit, cols, unit)[:, :, 0, :, 0].reshape(-1, rows * cols)
    order = np.where(hidden, rng.random(hidden.shape), 2.0).argsort(axis=1)
    shown = int((~hidden[0]).sum())
    other = np.ones_like(hidden)
    np.put_along_axis(other, order[:, :shown], False, axis=1)
    return other.reshape(-1, rows, cols).repeat(unit, axis=1).repeat(unit, axis=2).reshape(masked.shape)


def view(
    rng: np.random.Generator,
    *,
    first: Callable[[np.random.Generator], dict[str, np.ndarray]],
    grid: Grid,
    unit: int,
    partial: Partial | None,
) -> dict[str, np.ndarray]:
    """The method's own view of the first picture, and of the second one with other visible patches: (2, ...) each."""
    one = first(rng)
    masked = np.ones((one["visible"].size // one["visible"].shape[-1], grid[0] * grid[1]), dtype=bool)
    np.put_along_axis(masked, np.atleast_2d(one["visible"]), False, axis=1)
    other = describe(rng, another_mask(rng, masked, grid, unit), partial, grid[1])
    two = one | {name: index.reshape(one[name].shape) for name, index in other.items()}
    return {name: np.stack([one[name], two[name]]) for name in one}


class Target(nn.Module):
    """What the momentum encoder makes of whole pictures; it has a projector and no predictor."""

    buckets: Tensor | None

    def __init__(self, encoder: ViT, projector: nn.Module, pooled: bool):
        super().__init__()
        self.encoder, self.projector, self.pooled = encoder, projector, pooled
        self.register_buffer("buckets", grid_buckets(*encoder.grid) if encoder.relative else None, persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 2, H, W, 3) uint8 -> (2B, 1, D), or (2B, N, D) of single tokens; fp32."""
        patches = patchify(images.transpose(0, 1).flatten(0, 1), self.encoder.patch)
        tokens = self.encoder.patch_embed(normalize_pixels(patches))
        if not self.encoder.relative:
            tokens = tokens + self.encoder.pos_embed[:, 1:]
        encoded = self.encoder(tokens, self.buckets)[:, 1:]
        rows = encoded.mean(1, keepdim=True) if self.pooled else encoded
        return self.projector(rows.flatten(0, 1)).float().view_as(rows)


class LUT(nn.Module):
    """L = L_method + alpha * L_context (eq. 3) around a method that can `learn`."""

    def __init__(self, config: Context, method: Any):
        super().__init__()
        self.config, self.method = config, method
        dim = method.encoder.arch.dim
        self.projector, self.predictor = mlp_head(dim, config.hidden), mlp_head(dim, config.hidden)

    @property
    def encoder(self) -> ViT:
        return self.method.encoder

    def view(self) -> functools.partial[dict[str, np.ndarray]]:
        """The function that the data workers call with a sample's generator."""
        method = self.method
        return functools.partial(
            view, first=method.view(), grid=method.sequence, unit=method.unit, partial=method.partial
        )

    def target(self) -> Target:
        """A copy of what the teacher follows."""
        encoder, projector = copy.deepcopy(self.encoder), copy.deepcopy(self.projector)
        return Target(encoder, projector, self.config.supervision == "pooled")

    def followed(self) -> list[nn.Module]:
        """What the teacher follows: `target`'s modules, in the same order."""
        return [self.encoder, self.projector]

    def forward(self, images: Tensor, view: dict[str, Tensor], target: Tensor) -> dict[str, Tensor]:
        """The loss of a batch and, detached and not weighted, its terms `mim` and `context`.

        Args:
            images: (B, 2, H, W, 3) uint8.
            view: as from `view()`, stacked over images: (B, 2, ...).
            target: (2B, 1, D) or (2B, N, D), what a `Target` returned for the same images.
        """
        B = len(images)
        index = {name: array.transpose(0, 1).flatten(0, 1) for name, array in view.items()}
        learned = self.method.learn(images.transpose(0, 1).flatten(0, 1), index, supervised=B)
        context = self._context(learned, target, B)
        loss = learned.loss + self.config.alpha * context
        return {"loss": loss, "mim": learned.loss.detach(), "context": context.detach()}

    def _context(self, learned: Learned, target: Tensor, B: int) -> Tensor:
        """Both directions, averaged: each picture's visible tokens against the teacher's view of the other one."""
        if self.config.supervision == "pooled":
            rows = learned.seen.mean(1, keepdim=True)
            other = target.roll(B, 0)
        else:
            rows = learned.seen
            other = take(target.roll(B, 0), learned.place)
        terms = []
        for picture in (slice(0, B), slice(B, 2 * B)):  # batch statistics of one picture at a time [code]
            predicted = self.predictor(self.projector(rows[picture].flatten(0, 1)))
            with torch.autocast(predicted.device.type, enabled=False):
                terms.append(self._distance(predicted.float(), other[picture].flatten(0, 1)))
        return (terms[0] + terms[1]) / 2

    def _distance(self, predicted: Tensor, target: Tensor) -> Tensor:
        """(R, D) and (R, D) fp32 -> (): Table 4d's losses."""
        if self.config.loss == "smooth_l1":
            return F.smooth_l1_loss(predicted, target)
        predicted, target = F.normalize(predicted, dim=-1), F.normalize(target, dim=-1)
        if self.config.loss == "cosine":
            return (predicted - target).square().sum(-1).mean()
        everyone, first = _of_all_ranks(target)
        right = first + torch.arange(len(predicted), device=predicted.device)
        return F.cross_entropy(predicted @ everyone.T / self.config.temperature, right)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, view: dict[str, Tensor]) -> dict[str, Tensor]:
        """The method's own pictures, of the first picture of each image."""
        return self.method.reconstruct(images[:, 0].contiguous(), {name: array[:, 0] for name, array in view.items()})


def _of_all_ranks(rows: Tensor) -> tuple[Tensor, int]:
    """All ranks' (R, D) rows, as many on each, without gradients, and where this rank's begin."""
    if not dist.is_initialized():
        return rows, 0
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts), dist.get_rank() * len(rows)
