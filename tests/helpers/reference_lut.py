"""Reference of LUT in float64, image by image; see reference.py."""

import math

import torch
from torch import Tensor

from helpers.reference import Weights, encode_sequence
from helpers.reference_mae import encode


def visible_tokens(
    image: Tensor, mask_indices: dict[str, Tensor], weights: Weights, heads: int, mask_token_block: int
) -> dict[tuple[int, int], Tensor]:
    """Return (window, position in the image) -> encoded visible token, for MAE, SimMIM or LoMaR."""
    patch = weights["encoder.patch_embed.proj.weight"].shape[-1]
    rows, columns = image.shape[0] // patch, image.shape[1] // patch
    visible, kept = mask_indices["visible"], mask_indices["kept"]
    if "decoder.embed.weight" in weights:
        mask_tokens = kept.tolist() if "mask_tokens.token" in weights else None
        _, encoded = encode(image, visible.tolist(), weights, heads, mask_tokens)
        return {(0, i): encoded[i] for i in visible.tolist()}
    windows = mask_indices.get("positions", torch.arange(rows * columns)[None])
    tokens = {}
    for w, window in enumerate(windows.tolist()):
        patches = [divmod(position, columns) for position in window]
        of_window, entered = (index.reshape(len(windows), -1)[w].tolist() for index in (visible, kept))
        masked = [i for i in range(len(window)) if i not in of_window]
        if "predictor.decoder.mask_token" in weights or "decoder.mask_token" in weights:
            entered = []
        _, encoded = encode_sequence(image, patches, masked, entered, mask_token_block, weights, heads)
        tokens |= {(w, window[i]): encoded[i] for i in of_window}
    return tokens


def head(inputs: list[Tensor], weights: Weights, name: str, training: bool) -> list[Tensor]:
    """Linear, batch normalization over the inputs (or with running statistics), ReLU, linear."""
    hidden = [weights[f"{name}.0.weight"] @ x for x in inputs]
    if training:
        mean = sum(hidden) / len(hidden)
        variance = sum((x - mean) ** 2 for x in hidden) / len(hidden)
    else:
        mean, variance = weights[f"{name}.1.running_mean"], weights[f"{name}.1.running_var"]
    scale = weights[f"{name}.1.weight"] / torch.sqrt(variance + 1e-5)
    normalized = [(x - mean) * scale + weights[f"{name}.1.bias"] for x in hidden]
    return [weights[f"{name}.3.weight"] @ torch.clamp(x, min=0) for x in normalized]


def teacher_features(image: Tensor, weights: Weights, heads: int, pooled: bool) -> list[Tensor]:
    """Return the projected tokens of a complete view, or the projection of their mean."""
    patch = weights["encoder.patch_embed.proj.weight"].shape[-1]
    rows, columns = image.shape[0] // patch, image.shape[1] // patch
    patches = [divmod(i, columns) for i in range(rows * columns)]
    _, encoded = encode_sequence(image, patches, [], [], 0, weights, heads)
    tokens = [encoded[i] for i in range(len(patches))]
    return head([sum(tokens) / len(tokens)] if pooled else tokens, weights, "projector", training=False)


def distance(predicted: list[Tensor], targets: list[Tensor], loss: str, temperature: float) -> Tensor:
    """Table 4d's losses over the vectors of a batch."""
    if loss == "smooth_l1":
        gaps = torch.cat([(p - t).abs() for p, t in zip(predicted, targets, strict=True)])
        return torch.stack([0.5 * gap**2 if gap < 1 else gap - 0.5 for gap in gaps]).mean()
    p = [vector / vector.norm() for vector in predicted]
    t = [vector / vector.norm() for vector in targets]
    if loss == "cosine":
        return sum(2 - 2 * (a @ b) for a, b in zip(p, t, strict=True)) / len(p)
    total = 0.0
    for i, vector in enumerate(p):
        logits = [vector @ other / temperature for other in t]
        total = total - torch.log(torch.exp(logits[i]) / sum(math.e**logit for logit in logits))
    return total / len(p)


def context_loss(
    images: Tensor, mask_indices: dict[str, Tensor], weights: Weights, teacher: Weights, heads: int, pooled: bool,
    loss: str, temperature: float, mask_token_block: int = 0,
) -> Tensor:  # fmt: skip
    """LUT's loss averaged over both directions, for images (B, 2, H, W, 3) and mask_indices (B, 2, ...)."""
    method = {name.removeprefix("method."): w for name, w in weights.items() if name.startswith("method.")}
    terms = []
    for view in (0, 1):
        inputs, targets = [], []
        for b in range(len(images)):
            indices = {name: index[b, view] for name, index in mask_indices.items()}
            tokens = visible_tokens(images[b, view], indices, method, heads, mask_token_block)
            whole = teacher_features(images[b, 1 - view], teacher, heads, pooled)
            inputs += [sum(tokens.values()) / len(tokens)] if pooled else list(tokens.values())
            targets += whole if pooled else [whole[position] for _, position in tokens]
        predicted = head(head(inputs, weights, "projector", True), weights, "predictor", True)
        terms.append(distance(predicted, targets, loss, temperature))
    return (terms[0] + terms[1]) / 2
