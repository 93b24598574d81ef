"""Our encoder as a backbone of mmdet and mmseg: images of any size -> feature maps.

Parameters have the encoder's (timm's) names: `patch_embed.proj`, `blocks.N.attn.qkv`, `norm`. Parts without pretrained
weights (ViTDet's tables and the convolutions) initially output zero, so that a loaded backbone starts as pretrained.
`init_cfg=dict(type="EncoderCheckpoint", checkpoint=...)` loads an encoder (`downstream.dense.backbone.loading`).
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from data.transforms import height_width
from downstream.dense.backbone.attention import DecomposedAttention, GridAttention, RelativeAttention
from downstream.dense.backbone.convolution import on_grid, parallel_branch, propagation
from downstream.dense.backbone.mlp import Mlp
from downstream.dense.backbone.relative_position import Grid, resize_positions
from pretrain.models.heads import SyncBatchNorm
from pretrain.models.vit import ARCHS, Arch, at_least_fp32, init_weights, sincos_positions


class PatchEmbed(nn.Module):
    """(B, 3, H, W) images -> (B, D, H/p, W/p)."""

    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); (B, L, D) -> (B, L, D).

    Args:
        arch: width and heads.
        attention: the block's attention.
        drop_path: probability of skipping a branch, per image, in training.
        parallel: whether to add convolutions of the block's input to the output of attention.
        propagate: whether to add a convolution after the block.
    """

    def __init__(self, arch: Arch, attention: GridAttention, drop_path: float, parallel: bool, propagate: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(arch.dim, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(arch.dim, eps=1e-6)
        self.mlp = Mlp(arch.dim, 4 * arch.dim)
        self.drop_path = DropPath(drop_path)
        self.parallel = parallel_branch(arch.dim) if parallel else None
        self.propagate = propagation(arch.dim) if propagate else None
        for part in (self.attn, self.mlp):
            part.apply(init_weights)

    def forward(self, x: Tensor, grid: Grid, window_size: int) -> Tensor:
        convolved = 0.0 if self.parallel is None else self.drop_path(on_grid(self.parallel, x, grid))
        x = x + self.drop_path(self.attn(self.norm1(x), grid, window_size)) + convolved
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x if self.propagate is None else x + on_grid(self.propagate, x, grid)


@MODELS.register_module()
class PlainViT(BaseModule):
    """A plain Vision Transformer over whole images, or ViTDet's version with windows and some global blocks.

    Args:
        arch: a name in `ARCHS`.
        patch_size: side of a patch in pixels.
        img_size: side of the training images in pixels, or (height, width); other sizes work too.
        position: `relative` is LoMaR's in every block. `sincos` is an absolute table that is trained, as in MAE's
            fine-tuning, plus ViTDet's decomposed relative position in every block. The table has no row for the class
            token; `downstream.checkpoints.weights` folds that token's position into it.
        window_size: side of the windows in patches; 0: every block is global.
        global_blocks: blocks that attend to the whole image while the others use windows.
        conv_blocks: blocks followed by a convolution, ViTDet's other way across windows.
        parallel_conv: whether ViTAE's convolutions run parallel to every block's attention, with batch normalization
            over all ranks. The last convolution is initially zero.
        class_token: whether to keep it; only without windows.
        registers: number of registers kept behind the class token, which they need: all that the encoder has.
        out_indices: blocks whose tokens are returned; they must include the last block. Only the last block's tokens
            are normalized, as in pretraining.
        drop_path_rate: of the last block; it grows linearly over the depth.
        grad_checkpointing: whether to recompute each block in the backward pass: less memory, a third more compute.
        frozen: whether nothing of it is trained, and it is always in eval mode.
        init_cfg: mmengine's initializers, such as `EncoderCheckpoint`; without one, training starts from scratch.

    Raises:
        ValueError: settings contradict each other; the message names keys of `model.backbone`.
    """

    def __init__(
        self,
        arch: str = "vit_base",
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 1024,
        position: str = "relative",
        window_size: int = 14,
        global_blocks: Sequence[int] = (2, 5, 8, 11),
        conv_blocks: Sequence[int] = (),
        parallel_conv: bool = False,
        class_token: bool = False,
        registers: int = 0,
        out_indices: Sequence[int] = (11,),
        drop_path_rate: float = 0.1,
        grad_checkpointing: bool = False,
        frozen: bool = False,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ):
        super().__init__(init_cfg)
        height, width = height_width(img_size)
        if arch not in ARCHS:
            raise ValueError(f"model.backbone.arch={arch!r}: must be one of {', '.join(ARCHS)}")
        self.arch, self.patch_size, self.position = ARCHS[arch], patch_size, position
        if height % patch_size or width % patch_size or min(height, width) < patch_size:
            raise ValueError(
                f"model.backbone.img_size={height}x{width} is not a multiple of model.backbone.patch_size={patch_size}"
            )
        if position not in ("relative", "sincos"):
            raise ValueError(f"model.backbone.position={position!r}: must be relative or sincos")
        _check_prefix_tokens(class_token, registers, window_size)
        depth = self.arch.depth
        _check_blocks(depth, conv_blocks, global_blocks if window_size else (), out_indices)
        self.grid = (height // patch_size, width // patch_size)
        self.window_sizes = tuple(0 if i in global_blocks else window_size for i in range(depth))
        self.out_indices = tuple(sorted(out_indices))
        self.grad_checkpointing, self.frozen = grad_checkpointing, frozen

        dim = self.arch.dim
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        table = sincos_positions(dim, *self.grid)[None]
        self.pos_embed = nn.Parameter(table) if position == "sincos" else None
        self.blocks = nn.ModuleList(
            Block(
                self.arch, self._attention(i), drop_path_rate * i / max(depth - 1, 1), parallel_conv, i in conv_blocks
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.patch_embed.apply(init_weights)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=0.02)
        self.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> "PlainViT":
        super().train(mode and not self.frozen)
        return self

    def _attention(self, number: int) -> GridAttention:
        dim, _, heads = self.arch
        if self.position == "relative":
            return RelativeAttention(dim, heads)
        window_size = self.window_sizes[number]
        return DecomposedAttention(dim, heads, (window_size, window_size) if window_size else self.grid)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) standardized pixels -> (B, D, H/p, W/p) for each of `out_indices`.

        Raises:
            ValueError: the height or width of the images is not a multiple of the patch size.
        """
        height, width = images.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"the image size {height}x{width} is not a multiple of model.backbone.patch_size={self.patch_size}: "
                f"set pad_size_divisor={self.patch_size} in model.data_preprocessor"
            )
        x, grid = self.embed(images, self.pos_embed)
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        x = torch.cat([*prefix, x], dim=1)
        num_prefix_tokens = x.shape[1] - grid[0] * grid[1]
        maps = self.encode(x, grid, self.window_sizes)
        return tuple(tokens[:, num_prefix_tokens:].transpose(1, 2).unflatten(2, grid) for tokens in maps)

    def embed(self, images: Tensor, positions: Tensor | None) -> tuple[Tensor, Grid]:
        """(B, 3, H, W) and a table (1, N, D) for `self.grid` -> (B, L, D) tokens and their grid (H/p, W/p)."""
        image = at_least_fp32(self.patch_embed(images))
        grid = (image.shape[2], image.shape[3])
        x = image.flatten(2).transpose(1, 2)
        return (x if positions is None else x + resize_positions(positions, self.grid, grid)), grid

    def encode(self, x: Tensor, grid: Grid, window_sizes: Sequence[int]) -> list[Tensor]:
        """Runs (B, L, D) tokens through the blocks with these windows -> (B, L, D) for each of `out_indices`."""
        out = []
        for number, (block, window_size) in enumerate(zip(self.blocks, window_sizes, strict=True)):
            if self.grad_checkpointing and self.training:
                x = recompute(block, x, grid, window_size, use_reentrant=False, context_fn=partial(_contexts, block))
            else:
                x = block(x, grid, window_size)
            if number in self.out_indices:
                out.append(self.norm(x) if number == len(self.blocks) - 1 else x)
        return out


def _check_prefix_tokens(class_token: bool, registers: int, window_size: int) -> None:
    """Raises ValueError for a class token with windows, or registers without the class token."""
    if class_token and window_size:
        raise ValueError(
            f"model.backbone.class_token=True does not work with windows: set model.backbone.window_size=0 (it is "
            f"{window_size}), or class_token=False"
        )
    if registers and not class_token:
        raise ValueError(
            f"model.backbone.registers={registers} needs the class token: set "
            f"model.backbone.class_token=True, or registers=0"
        )


def _check_blocks(
    depth: int, conv_blocks: Sequence[int], global_blocks: Sequence[int], out_indices: Sequence[int]
) -> None:
    """Raises ValueError if one of these names a missing block or a block twice, or outputs lack the last block."""
    named = {"conv_blocks": conv_blocks, "out_indices": out_indices, "global_blocks": global_blocks}
    for key, blocks in named.items():
        if len(set(blocks)) < len(blocks) or not all(0 <= number < depth for number in blocks):
            raise ValueError(f"model.backbone.{key}={tuple(blocks)}: give distinct blocks from 0 to {depth - 1}")
    if depth - 1 not in out_indices:
        raise ValueError(f"model.backbone.out_indices={tuple(out_indices)} leaves out the last block, {depth - 1}")


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for a block's forward pass and its recomputation, which must not update batch statistics again."""
    return nullcontext(), _frozen_statistics(block)


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    norms = [module for module in block.modules() if isinstance(module, SyncBatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
