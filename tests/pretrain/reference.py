"""LoMaR spelled out: loops over images, windows, queries and keys, in float64, in the paper's order.

It shares no code with `pretrain`: only the names of the weights and the view arrays that say what was drawn. It is
slow and meant to be read beside section 3.2 of the paper; `test_lomar.py` holds the real model against it.
"""

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]

PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASS_BUCKET = 49
ALPHA, BETA, GAMMA = 1.9, 3.8, 15.2


def axis_bucket(offset: float) -> int:
    """iRPE's piecewise index along one axis: exact near zero, logarithmic further out, -3..3."""
    if abs(offset) <= ALPHA:
        return round(offset)
    logarithmic = round(ALPHA + math.log(abs(offset) / ALPHA) / math.log(GAMMA / ALPHA) * (BETA - ALPHA))
    return int(math.copysign(min(logarithmic, BETA), offset))


def bucket(query: tuple[int, int], key: tuple[int, int]) -> int:
    """The "product" bucket of two patches at (row, column)."""
    return (axis_bucket(query[0] - key[0]) + 3) * 7 + axis_bucket(query[1] - key[1]) + 3


def cut_patch(image: Tensor, row: int, col: int, patch: int) -> Tensor:
    """Pixels of one patch as a vector: rows, then columns, then RGB; each channel standardised."""
    square = image[row * patch : (row + 1) * patch, col * patch : (col + 1) * patch]
    return torch.stack(
        [(value.double() / 255 - PIXEL_MEAN[c]) / PIXEL_STD[c] for line in square for pixel in line
         for c, value in enumerate(pixel)]
    )  # fmt: skip


def embed(pixels: Tensor, weights: Weights) -> Tensor:
    """The patch projection, a convolution whose kernel (D, 3, p, p) covers exactly one patch."""
    kernel = weights["encoder.patch_embed.proj.weight"]
    _, channels, patch, _ = kernel.shape
    token = weights["encoder.patch_embed.proj.bias"]
    for row in range(patch):
        for col in range(patch):
            for channel in range(channels):
                token = token + kernel[:, channel, row, col] * pixels[(row * patch + col) * channels + channel]
    return token


def position(row: int, col: int, dim: int) -> Tensor:
    """MAE's fixed position of a patch, for the ablation without relative position."""
    quarter = dim // 4
    angles = [(place / 10000 ** (i / quarter), i) for place in (col, row) for i in range(quarter)]
    column, line = angles[:quarter], angles[quarter:]
    values = [f(angle) for axis in (column, line) for f in (math.sin, math.cos) for angle, _ in axis]
    return torch.tensor(values, dtype=torch.float64)


def layer_norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    mean = x.sum() / len(x)
    variance = ((x - mean) ** 2).sum() / len(x)
    return (x - mean) / torch.sqrt(variance + 1e-6) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(tokens: list[Tensor], buckets: list[list[int]] | None, weights: Weights, name: str, heads: int):
    """Every query against every key; the relative term meets the query before its scaling."""
    dim = len(tokens[0])
    head_dim = dim // heads
    qkv = [linear(token, weights, f"{name}.qkv") for token in tokens]
    outputs = []
    for i in range(len(tokens)):
        joined = []
        for head in range(heads):
            own = slice(head * head_dim, (head + 1) * head_dim)
            q = qkv[i][:dim][own]
            logits = []
            for j in range(len(tokens)):
                logit = (q @ qkv[j][dim : 2 * dim][own]) / math.sqrt(head_dim)
                if buckets is not None:
                    logit = logit + q @ weights[f"{name}.rpe_k.lookup_table_weight"][0, :, buckets[i][j]]
                logits.append(logit)
            exponents = [torch.exp(logit) for logit in logits]
            total = sum(exponents)
            joined.append(sum(e / total * qkv[j][2 * dim :][own] for j, e in enumerate(exponents)))
        outputs.append(linear(torch.cat(joined), weights, f"{name}.proj"))
    return outputs


def block(tokens: list[Tensor], buckets: list[list[int]] | None, weights: Weights, name: str, heads: int):
    """Pre-norm: each half adds to the residual stream what it makes of the normalised stream."""
    attended = attention(
        [layer_norm(x, weights, f"{name}.norm1") for x in tokens], buckets, weights, f"{name}.attn", heads
    )
    tokens = [x + y for x, y in zip(tokens, attended, strict=True)]
    result = []
    for x in tokens:
        hidden = gelu(linear(layer_norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1"))
        result.append(x + linear(hidden, weights, f"{name}.mlp.fc2"))
    return result


def encode_window(image: Tensor, places: list[tuple[int, int]], masked: set[int], weights: Weights, heads: int):
    """One window: class token and all patches in raster order, a mask token where a patch is masked.

    Args:
        image: (H, W, 3) uint8.
        places: (row, column) of the window's patches in the image's grid, in raster order.
        masked: which of them are masked.

    Returns:
        The encoded patches, without the class token.
    """
    patch = weights["encoder.patch_embed.proj.weight"].shape[-1]
    relative = "encoder.blocks.0.attn.rpe_k.lookup_table_weight" in weights
    tokens = [weights["encoder.cls_token"][0, 0]]
    for i, (row, col) in enumerate(places):
        token = weights["mask_token"][0, 0] if i in masked else embed(cut_patch(image, row, col, patch), weights)
        tokens.append(token if relative else token + position(row, col, len(token)))
    buckets = None
    if relative:
        buckets = [[CLASS_BUCKET] * len(tokens)]
        buckets += [[CLASS_BUCKET] + [bucket(query, key) for key in places] for query in places]
    depth = len({name.split(".")[2] for name in weights if name.startswith("encoder.blocks.")})
    for n in range(depth):
        tokens = block(tokens, buckets, weights, f"encoder.blocks.{n}", heads)
    return [layer_norm(x, weights, "encoder.norm") for x in tokens[1:]]


def target_of(pixels: Tensor, norm_pix: bool) -> Tensor:
    """What a masked patch is compared with: its pixels, by its own mean and unbiased variance where `norm_pix`."""
    if not norm_pix:
        return pixels
    mean = pixels.sum() / len(pixels)
    variance = ((pixels - mean) ** 2).sum() / (len(pixels) - 1)
    return (pixels - mean) / torch.sqrt(variance + 1e-6)


def lomar_loss(images: Tensor, view: dict[str, Tensor], weights: Weights, heads: int, norm_pix: bool) -> Tensor:
    """Mean squared error over all masked patches of all windows of all images.

    Args:
        images: (B, H, W, 3) uint8.
        view: `window` (B, W, K*K) grid positions, `masked` (B, W, M) positions within the window.
        weights: the state dict of `LoMaR`, in float64.
    """
    patch = weights["encoder.patch_embed.proj.weight"].shape[-1]
    columns = images.shape[2] // patch
    errors = []
    for image, windows, masks in zip(images, view["window"].tolist(), view["masked"].tolist(), strict=True):
        for window, masked in zip(windows, masks, strict=True):
            places = [divmod(position, columns) for position in window]
            encoded = encode_window(image, places, set(masked), weights, heads)
            for i in masked:
                target = target_of(cut_patch(image, *places[i], patch), norm_pix)
                errors.append(((linear(encoded[i], weights, "head") - target) ** 2).sum() / len(target))
    return sum(errors) / len(errors)
