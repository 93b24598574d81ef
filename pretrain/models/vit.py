"""Plain pre-norm Vision Transformers, Ti to H, with timm's parameter names.

A method calls the parts in turn: `patch_embed` (patches -> tokens), and the encoder itself (prefix tokens + tokens at
their positions -> blocks -> norm). Which tokens enter is the method's business.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.pixel_format import IMAGENET, Pixels
from pretrain.models.attention import Attention, Position, RelativeBias
from pretrain.models.patches import normalize_pixels
from pretrain.models.relative_position import grid_buckets, offset_buckets


class Arch(NamedTuple):
    """Width, number of blocks and number of heads."""

    dim: int
    depth: int
    heads: int


ARCHS = {
    "vit_tiny": Arch(192, 12, 3),
    "vit_small": Arch(384, 12, 6),
    "vit_base": Arch(768, 12, 12),
    "vit_large": Arch(1024, 24, 16),
    "vit_huge": Arch(1280, 32, 16),
}


def sincos_positions(dim: int, height: int, width: int) -> Tensor:
    """MAE's fixed 2-D positions: half of the channels encode the column, half the row.

    Returns:
        (height*width, dim) float32, in raster order.
    """
    assert dim % 4 == 0, dim
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    cols = torch.arange(width, dtype=torch.float64).repeat(height)[:, None] * frequency
    rows = torch.arange(height, dtype=torch.float64).repeat_interleave(width)[:, None] * frequency
    return torch.cat([cols.sin(), cols.cos(), rows.sin(), rows.cos()], dim=1).float()


def at_least_fp32(x: Tensor) -> Tensor:
    """The residual stream's precision: fp32 even under autocast, as in the authors' code; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _PatchProjection(nn.Conv2d):
    """timm's `patch_embed.proj` applied to patches that are already cut: a matrix product on only the given ones."""

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """(..., p*p*C) patches of `pixels`, channels last within a patch -> standardized -> (..., D) tokens."""

    def __init__(self, patch_size: int, dim: int, pixels: Pixels = IMAGENET):
        super().__init__()
        self.pixels, self.proj = pixels, _PatchProjection(pixels.channels, dim, patch_size, patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        return self.proj(normalize_pixels(patches, self.pixels))


class DropPath(nn.Module):
    """Stochastic depth: in training, zeroes a share of the sequences and scales up the others to compensate.

    timm's rate is a Python number, for each value of which a block would be recompiled.
    """

    kept_share: Tensor

    def __init__(self, rate: float):
        super().__init__()
        self.register_buffer("kept_share", torch.tensor(1.0 - rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) of any dtype -> the same."""
        if not self.training:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) < self.kept_share
        return x * (kept / self.kept_share).to(x.dtype)


class LayerScale(nn.Module):
    """A trained factor for each channel (Touvron et al., CaiT)."""

    def __init__(self, dim: int, init_value: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_value))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> the same."""
        return x * self.gamma.to(x.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), each optionally scaled and randomly skipped.

    Args:
        arch: width and heads.
        relative, bias_grid: as for `Attention`.
        drop_path_rate: probability of skipping.
        layer_scale: initial value of the scales; 0 for none.
    """

    def __init__(
        self,
        arch: Arch,
        relative: bool,
        bias_grid: tuple[int, int] | None = None,
        drop_path_rate: float = 0.0,
        layer_scale: float = 0.0,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(arch.dim, eps=1e-6)
        self.attn = Attention(arch.dim, arch.heads, relative, bias_grid)
        self.norm2 = nn.LayerNorm(arch.dim, eps=1e-6)
        self.mlp = Mlp(arch.dim, 4 * arch.dim)
        self.ls1 = LayerScale(arch.dim, layer_scale) if layer_scale else nn.Identity()
        self.ls2 = LayerScale(arch.dim, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()

    def forward(self, x: Tensor, position: Position | None) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), position)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class ViT(nn.Module):
    """The encoder.

    Args:
        arch: a name of `ARCHS`.
        patch_size: side of a patch in pixels.
        grid: rows and columns of the image's patches; contextual relative position does not depend on it.
        relative: contextual relative position in every block instead of fixed sin-cos positions.
        grad_checkpointing: recompute each block in the backward pass: less memory, a third more compute.
        bias: a learned relative bias (BEiT's, SimMIM's) in every block instead of either.
        shared_bias: a single bias for all blocks, as when BEiT and SimMIM pretrain.
        learned: learned absolute positions instead of fixed ones.
        registers: tokens after the class token that belong to no patch (DINOv2's; Pixio's further class tokens).
        layer_scale: initial value of the factors that scale what each block adds; 0 for none.
        class_token: false for encoders from other projects without one (I-JEPA's), for features only.
        drop_path_rate: stochastic depth of the last block; it grows linearly over the blocks, from 0 in the first.
        pixels: the images' number of channels and their statistics.

    Attributes:
        residual_dtype: dtype of the residual stream; `at_least_fp32` unless set.
        window_kernel: whether callers should pass `WindowTokens` where they could pass buckets.
        class_adapter: applied to the class token before it enters, while TEC trains; see `fold_class_adapter`.
    """

    pos_embed: Tensor  # (1, 1+N, D): the class token's first; registers have none
    residual_dtype: torch.dtype | None = None
    window_kernel: bool = False

    def __init__(
        self,
        arch: str,
        patch_size: int,
        grid: tuple[int, int],
        relative: bool = True,
        grad_checkpointing: bool = False,
        bias: bool = False,
        class_token: bool = True,
        drop_path_rate: float = 0.0,
        shared_bias: bool = False,
        learned: bool = False,
        registers: int = 0,
        layer_scale: float = 0.0,
        pixels: Pixels = IMAGENET,
    ):
        super().__init__()
        assert relative + (bias or shared_bias) + learned <= 1, "one kind of position"
        assert class_token or not (relative or bias or registers), "buckets have a row for the class token"
        self.arch, self.patch_size, self.grid, self.relative = ARCHS[arch], patch_size, grid, relative
        self.grad_checkpointing, self.bias, self.registers = grad_checkpointing, bias or shared_bias, registers
        dim, self.pixels = self.arch.dim, pixels
        self.patch_embed = PatchEmbed(patch_size, dim, pixels)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        if learned:
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid[0] * grid[1], dim))
        elif self.absolute:  # a buffer: a frozen parameter would be missing from the optimizer's shards
            self.register_buffer("pos_embed", F.pad(sincos_positions(dim, *grid), (0, 0, 1, 0))[None])
        self.class_adapter: nn.Module | None = None
        self.rel_pos_bias = RelativeBias(self.arch.heads, grid) if shared_bias else None
        rates = [drop_path_rate * block / max(self.arch.depth - 1, 1) for block in range(self.arch.depth)]
        bias_grid = grid if bias else None
        self.blocks = nn.ModuleList(Block(self.arch, relative, bias_grid, rate, layer_scale) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_weights)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        if learned:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images whose patches `grid` counts."""
        rows, cols = self.grid
        return rows * self.patch_size, cols * self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches: the class token, if there is one, and registers (timm's name)."""
        return (0 if self.cls_token is None else 1) + self.registers

    @property
    def absolute(self) -> bool:
        """Whether positions are added to the tokens as they enter."""
        return not (self.relative or self.bias)

    @property
    def position(self) -> str:
        """`relative`, `bias` or `sincos`; the last is any absolute table, even a learned one."""
        return "relative" if self.relative else "bias" if self.bias else "sincos"

    def grid_position(self, grid: tuple[int, int] | None = None, device: torch.device | None = None) -> Tensor:
        """The `position` of all patches of a grid in raster order, by default the encoder's own, on the CPU."""
        rows, cols = grid or self.grid
        if self.absolute:
            return torch.arange(rows * cols, device=device)
        return (grid_buckets if self.relative else offset_buckets)(rows, cols, self.num_prefix_tokens).to(device)

    def forward(
        self,
        tokens: Tensor,
        position: Position | None = None,
        start: int = 0,
        stop: int | None = None,
        hidden: Sequence[int] = (),
    ) -> Tensor | list[Tensor]:
        """Puts the prefix tokens in front and encodes, all at once or in two parts, between which tokens may join.

        Args:
            tokens: (B, L, D) patch tokens; with a `start`, the prefix tokens are already in front of them.
            position: if relative, that of every pair of the P + L tokens: `grid_buckets`, `pair_buckets` or
                `window_tokens`, or for a learned bias `offset_buckets` or `pair_offsets`. If absolute, the tokens' grid
                positions (B, L) or (L,), whose embeddings are added here; None if they are added already.
            start, stop: the range of blocks to run; the last norm is applied only if `stop` is None.
            hidden: ascending block numbers; the last of them is the last block to run. 1 is the first block, and 0
                stands for its input.

        Returns:
            (B, P+L, D), the prefix tokens first. With `hidden`, a list of the residual streams behind these blocks,
            each of this shape and without a norm.
        """
        if self.absolute and isinstance(position, Tensor):
            tokens, position = tokens + self.pos_embed[0, 1 + position], None
        x = at_least_fp32(tokens) if self.residual_dtype is None else tokens.to(self.residual_dtype)
        if start == 0 and self.cls_token is not None:
            class_token = self.cls_token if self.class_adapter is None else self.class_adapter(self.cls_token)
            prefix = class_token + self.pos_embed[:, :1] if self.absolute else class_token
            if self.reg_token is not None:
                prefix = torch.cat([prefix, self.reg_token], dim=1)
            # Not `len(x)`: tracing would fix the batch size.
            x = torch.cat([prefix.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        if self.rel_pos_bias is not None:
            position = self.rel_pos_bias(position)
        streams = {start: x} if start in hidden else {}
        for number, block in enumerate(self.blocks[start : hidden[-1] if hidden else stop], start + 1):
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, position, use_reentrant=False)
            else:
                x = block(x, position)
            if number in hidden:
                streams[number] = x
        if hidden:
            return [streams[number] for number in hidden]
        return self.norm(x) if stop is None else x


def fold_class_adapter(cls_token: Tensor, *adapter: Tensor) -> Tensor:
    """The class token after TEC's MLP, whose two weights and biases are given in timm's order."""
    weight1, bias1, weight2, bias2 = adapter
    return F.linear(F.gelu(F.linear(cls_token, weight1, bias1)), weight2, bias2)


CLASS_ADAPTER = tuple(f"class_adapter.{name}" for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"))


def init_weights(module: nn.Module) -> None:
    """MAE's initialization: Xavier-uniform matrices (the patch projection seen as one), zero biases, unit norms."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.flatten(1) if module.weight.ndim == 4 else module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
