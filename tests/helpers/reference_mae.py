"""Reference of MAE and its reconstruction targets, as in `reference.py`: loops over images and patches in float64.

It shares no code with `pretrain`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from helpers.reference import (
    Weights,
    absolute_position,
    block,
    cut_patch,
    embed,
    layer_norm,
    linear,
    prefix_tokens,
    target_of,
    transformer,
    transformer_decoder,
)
from helpers.reference_cross import cross_predict

Error = Callable[[Tensor, Tensor, int], Tensor]  # (prediction, image, position of the patch) -> its error


def encode(
    image: Tensor, visible: list[int], weights: Weights, heads: int, mask_tokens: list[int] | None = None,
    fused: list[int] | None = None,
) -> tuple[list[Tensor], dict[int, Tensor]]:  # fmt: skip
    """Encode prefix tokens, visible patches and mask tokens at `mask_tokens`; patches are returned by position.

    With `fused`, the numbers of MFF's blocks, the result is the weighted sum of their projected outputs.
    """
    patch = weights["encoder.patch_embed.proj.weight"].shape[-1]
    columns = image.shape[1] // patch
    entered = sorted([*visible, *(mask_tokens or [])])
    prefix = prefix_tokens(weights)
    tokens = list(prefix)
    for i in entered:
        row, col = divmod(i, columns)
        token = (
            embed(cut_patch(image, row, col, patch), weights) if i in visible else weights["mask_tokens.token"][0, 0]
        )
        tokens.append(token + absolute_position(row, col, columns, token, weights))
    if fused is None:
        encoded = transformer(tokens, None, weights, "encoder", heads)
    else:
        encoded = [layer_norm(x, weights, "encoder.norm") for x in fuse(tokens, fused, weights, heads)]
    return encoded[: len(prefix)], dict(zip(entered, encoded[len(prefix) :], strict=True))


def fuse(tokens: list[Tensor], blocks: list[int], weights: Weights, heads: int) -> list[Tensor]:
    exponents = [torch.exp(logit) for logit in weights["fusion.logits"]]
    total = [torch.zeros_like(x) for x in tokens]
    for n in range(blocks[-1]):
        tokens = block(tokens, None, weights, f"encoder.blocks.{n}", heads)
        if n + 1 in blocks:
            i, last = blocks.index(n + 1), n + 1 == blocks[-1]
            outputs = tokens if last else [linear(x, weights, f"fusion.projections.{i}") for x in tokens]
            total = [z + exponents[i] / sum(exponents) * x for z, x in zip(total, outputs, strict=True)]
    return total


def mae_loss(
    images: Tensor, mask_indices: dict[str, Tensor], weights: Weights, heads: int, decoder_heads: int, error: Error,
    fused: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """Mean error over all masked patches of all images.

    Args:
        images: (B, H, W, 3) uint8.
        mask_indices: `visible` (B, V), `masked` (B, M) and `kept` (B, K) grid positions.
        weights: the state dict of `MAE`, in float64; if it has `mask_tokens`, they enter the encoder.
        heads, decoder_heads: numbers of heads of the encoder and the decoder.
        error: the error of a prediction.
        fused: the blocks of MFF.
    """
    patch = weights["encoder.patch_embed.proj.weight"].shape[-1]
    grid = images.shape[1] // patch, images.shape[2] // patch
    errors = []
    for b, image in enumerate(images):
        visible, masked, kept = (mask_indices[name][b].tolist() for name in ("visible", "masked", "kept"))
        if "decoder.blocks.0.cross_attn.q.weight" in weights:
            patches = [divmod(i, grid[1]) for i in range(grid[0] * grid[1])]
            predicted = cross_predict(image, patches, visible, kept, grid, weights, heads, decoder_heads, "decoder")
            errors += [error(predicted[i], image, i) for i in masked]
            continue
        mask_tokens = kept if "mask_tokens.token" in weights else None
        prefix, encoded = encode(image, visible, weights, heads, mask_tokens, fused)
        predicted = transformer_decoder(
            prefix, encoded, kept, grid, weights, decoder_heads, fill=len(kept) < len(masked)
        )
        errors += [error(predicted[i], image, i) for i in masked]
    return sum(errors) / len(errors)


def pixel_error(patch: int, norm_pix: bool) -> Error:
    """Mean squared error of the patch's pixels."""

    def error(prediction: Tensor, image: Tensor, position: int) -> Tensor:
        target = target_of(cut_patch(image, *divmod(position, image.shape[1] // patch), patch), norm_pix)
        return ((prediction - target) ** 2).sum() / len(target)

    return error


def pca_error(patch: int, mean: Tensor, components: Tensor) -> Error:
    """Mean squared error of the coefficients of the patch's centered pixels along the components."""

    def error(prediction: Tensor, image: Tensor, position: int) -> Tensor:
        pixels = cut_patch(image, *divmod(position, image.shape[1] // patch), patch) - mean.double()
        coefficients = [sum(c * x for c, x in zip(component.double(), pixels, strict=True)) for component in components]
        return sum((p - c) ** 2 for p, c in zip(prediction, coefficients, strict=True)) / len(coefficients)

    return error


def token_error(codes_of: Callable[[Tensor], list[int]]) -> Error:
    """-log softmax(prediction)[code of the patch]."""

    def error(prediction: Tensor, image: Tensor, position: int) -> Tensor:
        return torch.log(torch.exp(prediction).sum()) - prediction[codes_of(image)[position]]

    return error
