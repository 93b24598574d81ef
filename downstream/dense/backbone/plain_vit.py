"""Our encoder as a backbone of mmdet and mmseg: images of any size -> maps of features.

Parameters have the encoder's (timm's) names: `patch_embed.proj`, `blocks.N.attn.qkv`, `norm`. What pretraining has not,
ViTDet's tables and the convolutions, is zero at first, so that a loaded backbone starts at what was pretrained.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from downstream.checkpoints.files import Weights
from downstream.checkpoints.weights import Size
from downstream.dense.backbone.attention import DecomposedAttention, GridAttention, RelativeAttention
from downstream.dense.backbone.convolution import on_grid, parallel_branch, propagation
from downstream.dense.backbone.loading import load_start
from downstream.dense.backbone.mlp import Mlp
from downstream.dense.backbone.relative_position import Grid, resize_positions
from pretrain.models.heads import SyncBatchNorm
from pretrain.models.vit import ARCHS, Arch, init_weights, sincos_positions


class PatchEmbed(nn.Module):
    """(B, 3, H, W) images -> (B, D, H/p, W/p)."""

    def __init__(self, patch: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); (B, L, D) -> (B, L, D).

    Args:
        arch: width and heads.
        attention: its attention.
        drop_path: the share of images that skip a branch while training.
        parallel: a convolution of the block's input beside attention.
        propagate: a convolution behind the block.
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

    def forward(self, x: Tensor, grid: Grid, window: int) -> Tensor:
        beside = 0.0 if self.parallel is None else self.drop_path(on_grid(self.parallel, x, grid))
        x = x + self.drop_path(self.attn(self.norm1(x), grid, window)) + beside
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x if self.propagate is None else x + on_grid(self.propagate, x, grid)


@MODELS.register_module()
class PlainViT(BaseModule):
    """A plain Vision Transformer over whole images, or ViTDet's: windows, with some blocks that see everything.

    Args:
        arch: a name of `ARCHS`.
        patch: side of a patch in pixels.
        size: of the images it is trained with, in pixels, or (height, width); others are possible.
        position: `relative`, LoMaR's in every block, or `sincos`, an absolute table that is trained, as in MAE's
            fine-tuning, with ViTDet's decomposed relative position in every block. The table has no row for the class
            token, whose position `downstream.checkpoints.weights` folds into the token.
        window: side of the windows in patches; 0: every block sees everything.
        global_blocks: those that see everything nevertheless.
        conv_blocks: those with a convolution behind them, ViTDet's other way across windows.
        parallel_conv: ViTAE's convolutions beside every block's attention, with batch normalisation over all ranks.
            Their last one is zero at first.
        class_token: keep it; only without windows.
        out_blocks: those whose tokens come out, the last block among them. That one's are normed as in pretraining,
            those of others are not.
        drop_path: of the last block; it grows linearly over the depth.
        checkpoint_blocks: recompute each block in the backward pass: less memory, a third more compute.
        frozen: nothing of it is trained, and it is always in eval mode.
        checkpoint, weights: what `init_weights` starts from, as of `downstream.checkpoints.weights.load_encoder`; from scratch
            without one.

    Raises:
        ValueError: settings that contradict each other, in terms of `model.backbone`.
    """

    def __init__(
        self,
        arch: str = "vit_base",
        patch: int = 16,
        size: Size = 1024,
        position: str = "relative",
        window: int = 14,
        global_blocks: Sequence[int] = (2, 5, 8, 11),
        conv_blocks: Sequence[int] = (),
        parallel_conv: bool = False,
        class_token: bool = False,
        out_blocks: Sequence[int] = (11,),
        drop_path: float = 0.1,
        grad_checkpointing: bool = False,
        frozen: bool = False,
        checkpoint: str | None = None,
        weights: Weights | None = None,
    ):
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        if arch not in ARCHS:
            raise ValueError(f"model.backbone.arch={arch!r}: one of {', '.join(ARCHS)}")
        self.arch, self.patch, self.position = ARCHS[arch], patch, position
        if height % patch or width % patch or min(height, width) < patch:
            raise ValueError(f"model.backbone.size={height}x{width} is no multiple of model.backbone.patch={patch}")
        if position not in ("relative", "sincos"):
            raise ValueError(f"model.backbone.position={position!r}: relative or sincos")
        if class_token and window:
            raise ValueError(
                f"model.backbone.class_token=True belongs to no window: set model.backbone.window=0 (it is {window}), "
                f"or class_token=False"
            )
        depth = self.arch.depth
        _check_blocks("conv_blocks", conv_blocks, depth)
        _check_blocks("out_blocks", out_blocks, depth)
        if window:
            _check_blocks("global_blocks", global_blocks, depth)
        if depth - 1 not in out_blocks:
            raise ValueError(f"model.backbone.out_blocks={tuple(out_blocks)} leaves out the last block, {depth - 1}")
        self.grid = (height // patch, width // patch)
        self.windows = tuple(0 if i in global_blocks else window for i in range(depth))
        self.out_blocks = tuple(sorted(out_blocks))
        self.grad_checkpointing, self.frozen = grad_checkpointing, frozen
        self.checkpoint, self.weights = checkpoint, weights

        dim = self.arch.dim
        self.patch_embed = PatchEmbed(patch, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        table = sincos_positions(dim, *self.grid)[None]
        self.pos_embed = nn.Parameter(table) if position == "sincos" else None
        self.blocks = nn.ModuleList(
            Block(self.arch, self._attention(i), drop_path * i / max(depth - 1, 1), parallel_conv, i in conv_blocks)
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.patch_embed.apply(init_weights)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)
        self.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> "PlainViT":
        super().train(mode and not self.frozen)
        return self

    def _attention(self, number: int) -> GridAttention:
        dim, _, heads = self.arch
        if self.position == "relative":
            return RelativeAttention(dim, heads)
        window = self.windows[number]
        return DecomposedAttention(dim, heads, (window, window) if window else self.grid)

    def init_weights(self) -> None:
        """Loads `checkpoint`, if there is one; everything else has its values since construction.

        Raises:
            ValueError: see `loading.load_start`.
        """
        if self.checkpoint is not None:
            print_log(str(load_start(self, self.checkpoint, self.weights)), logger="current")
        self._is_init = True

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) standardised pixels -> (B, D, H/p, W/p) for each of `out_blocks`.

        Raises:
            ValueError: the patch does not divide the images.
        """
        height, width = images.shape[2:]
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"images of {height}x{width} pixels are no multiple of model.backbone.patch={self.patch}: "
                f"set pad_size_divisor={self.patch} in model.data_preprocessor"
            )
        x, grid = self.embed(images, self.pos_embed)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        first = x.shape[1] - grid[0] * grid[1]
        maps = self.encode(x, grid, self.windows)
        return tuple(tokens[:, first:].transpose(1, 2).unflatten(2, grid) for tokens in maps)

    def embed(self, images: Tensor, positions: Tensor | None) -> tuple[Tensor, Grid]:
        """(B, 3, H, W), and a table (1, N, D) for `self.grid` -> (B, L, D) tokens and their grid, (H/p, W/p)."""
        # The residual stream stays in fp32 under autocast, as in pretraining.
        image = self.patch_embed(images).float()
        grid = (image.shape[2], image.shape[3])
        x = image.flatten(2).transpose(1, 2)
        return (x if positions is None else x + resize_positions(positions, self.grid, grid)), grid

    def encode(self, x: Tensor, grid: Grid, windows: Sequence[int]) -> list[Tensor]:
        """(B, L, D) tokens through blocks with these windows -> (B, L, D) for each of `out_blocks`."""
        out = []
        for number, (block, window) in enumerate(zip(self.blocks, windows, strict=True)):
            if self.grad_checkpointing and self.training:
                x = recompute(block, x, grid, window, use_reentrant=False, context_fn=partial(_twice, block))
            else:
                x = block(x, grid, window)
            if number in self.out_blocks:
                out.append(self.norm(x) if number == len(self.blocks) - 1 else x)
        return out


def _check_blocks(key: str, blocks: Sequence[int], depth: int) -> None:
    wrong = [number for number in blocks if not 0 <= number < depth]
    if wrong or len(set(blocks)) < len(blocks):
        raise ValueError(f"model.backbone.{key}={tuple(blocks)}: different blocks of 0 to {depth - 1}")


def _twice(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What surrounds a block's forward pass, and its repetition, which batch statistics must not follow again."""
    return nullcontext(), _kept_statistics(block)


@contextmanager
def _kept_statistics(block: nn.Module) -> Iterator[None]:
    norms = [module for module in block.modules() if isinstance(module, SyncBatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
