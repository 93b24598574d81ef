"""Our encoders as timm models, registered by `import downstream.checkpoints.timm_models`.

Then `timm.create_model("lomar_vit_base_patch16_224")` makes timm's own VisionTransformer (drop path, pooling,
`forward_intermediates`, layer-decay groups, heads) with our attention in its blocks, so the parameters keep their
names. Encoders with absolute positions do not need this: they are timm's plain `vit_*`.
"""

import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.transforms import height_width
from pretrain.models.attention import Attention
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.relative_position import grid_buckets, offset_buckets
from pretrain.models.vit import ARCHS

__all__ = ["LoMaRViT"]


class _TimmAttention(Attention):
    """Our attention with timm's signature: timm's mask is the buckets, the relative position of each pair of tokens."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x, attn_mask)


class _TimmBlock(Block):
    """timm's block with our attention; checkpoints itself, as timm does not checkpoint blocks that get a mask."""

    def __init__(self, dim: int, num_heads: int, relative_position: dict[str, Any], **options: Any):
        if options.get("attn_drop") or options.get("proj_drop"):
            raise ValueError("attn_drop_rate and proj_drop_rate are not supported: use drop_path_rate")
        super().__init__(dim, num_heads, **options)
        self.attn = _TimmAttention(dim, num_heads, **relative_position)
        self.recompute = False

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self.recompute and self.training:
            return checkpoint(super().forward, x, attn_mask, use_reentrant=False)
        return super().forward(x, attn_mask)


@lru_cache  # a copy to the device in each forward pass would make the host wait for it
@torch.inference_mode(False)  # tensors made in inference mode, in an evaluation, could not be used in training
def _on_device(
    buckets: Callable[[int, int, int], Tensor], grid: tuple[int, int], num_prefix_tokens: int, device: torch.device
) -> Tensor:
    return buckets(*grid, num_prefix_tokens).to(device)


class LoMaRViT(VisionTransformer):
    """A Vision Transformer with relative position.

    Args:
        position: `relative` (LoMaR's; any grid) or `bias` (BEiT's and SimMIM's; the grid of `img_size` only).
        options: those of timm's VisionTransformer.
    """

    def __init__(self, position: str = "relative", **options: Any):
        if position not in ("relative", "bias"):
            raise ValueError(
                f"position={position!r} must be relative or bias; for absolute positions use timm's own vit_*"
            )
        self.position = position
        patch_size, size = options["patch_size"], options.get("img_size", 224)
        height, width = height_width(size)
        grid = (height // patch_size, width // patch_size)
        relative = {"relative": True} if position == "relative" else {"relative": False, "bias_grid": grid}

        def block(**block_options: Any) -> _TimmBlock:
            return _TimmBlock(relative_position=relative, **block_options)

        super().__init__(pos_embed="none", block_fn=block, **options)

    def buckets(self, images: Tensor) -> Tensor:
        """The relative position of every pair of the tokens of (B, C, H, W) images."""
        height, width = self.patch_embed.dynamic_feat_size(images.shape[-2:])
        grid = (int(height), int(width))  # while tracing they are tensors
        if self.position == "relative":
            return _on_device(grid_buckets, grid, self.num_prefix_tokens, images.device)
        if grid != self.patch_embed.grid_size:
            raise ValueError(
                f"the bias tables are for {self.patch_embed.grid_size} patches, but the images have {grid}: resize one"
            )
        return _on_device(offset_buckets, grid, self.num_prefix_tokens, images.device)

    def forward_features(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return super().forward_features(x, attn_mask=self.buckets(x))

    def forward_intermediates(self, x: Tensor, *arguments: Any, **options: Any) -> Any:
        return super().forward_intermediates(x, *arguments, **{**options, "attn_mask": self.buckets(x)})

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for block in self.blocks:
            block.recompute = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Class token and, as in BEiT, bias tables; LoMaR's authors decay their tables."""
        biases = {name for name, _ in self.named_parameters() if "rpe_bias" in name}
        return super().no_weight_decay() | biases


def prefix_options(encoder: EncoderSpec) -> dict[str, Any]:
    """timm's options for the tokens before the patches, as far as they differ from its defaults."""
    options: dict[str, Any] = {} if encoder.class_token else {"class_token": False}
    if encoder.registers:
        options["reg_tokens"] = encoder.registers
        if encoder.position == "sincos":
            options["no_embed_class"] = True
    return options


def to_timm(encoder: EncoderSpec, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters as in timm's model; with `prefix_options`, its table has no row for the class token."""
    state = dict(state)
    if "pos_embed" in state and prefix_options(encoder):
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return state


def build_vit(encoder: EncoderSpec, num_classes: int, pool: str, **options: Any) -> VisionTransformer:
    """Builds timm's model around our encoder, freshly initialized.

    Args:
        encoder: spec of the encoder.
        num_classes: outputs of the head.
        pool: timm's `global_pool`: avg or token.
        options: further ones of timm's VisionTransformer.
    """
    dim, depth, heads = ARCHS[encoder.arch]
    options |= {"patch_size": encoder.patch_size, "img_size": encoder.image_size, "global_pool": pool}
    options |= {
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        "num_classes": num_classes,
        "in_chans": encoder.pixels.channels,
    }
    options |= prefix_options(encoder)
    if encoder.position == "sincos":
        return VisionTransformer(**options)
    return LoMaRViT(position=encoder.position, **options)


# Patch size and image size in a name are defaults: `patch_size` and `img_size` of create_model override them.
SIZES = [
    *((arch, 16, 224) for arch in ARCHS),
    *((arch, 16, size) for arch in ("vit_base", "vit_large") for size in (384, 448)),
    ("vit_base", 8, 224),
    ("vit_huge", 14, 224),
    ("vit_huge", 14, 448),
]


def model_name(arch: str, patch_size: int, image_size: int) -> str:
    return f"lomar_{arch}_patch{patch_size}_{image_size}"


default_cfgs = generate_default_cfgs(
    {
        model_name(*entry): {
            "url": "",
            "num_classes": 0,
            "input_size": (3, entry[2], entry[2]),
            "pool_size": None,
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        for entry in SIZES
    }
)


def _register(arch: str, patch_size: int, image_size: int) -> None:
    name = model_name(arch, patch_size, image_size)

    def entrypoint(pretrained: bool = False, **options: Any) -> nn.Module:
        dim, depth, heads = ARCHS[arch]
        defaults = {"patch_size": patch_size, "img_size": image_size, "num_classes": 0}
        fixed = {"embed_dim": dim, "depth": depth, "num_heads": heads}
        out_indices = options.pop("out_indices", 3)
        return build_model_with_cfg(
            LoMaRViT,
            name,
            pretrained,
            feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
            **{**defaults, **options, **fixed},
        )

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"{arch} with relative position, patches of {patch_size} pixels, images of {image_size}."
    setattr(sys.modules[__name__], name, entrypoint)
    register_model(entrypoint)


for _entry in SIZES:
    _register(*_entry)
