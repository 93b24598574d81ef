"""LUT spelled out in float64, image by image; see reference.py."""

import math

import torch
from torch import Tensor

from helpers.reference import Weights, encode_sequence
from helpers.reference_mae import encode


def visible_tokens(image: Tensor, mask_indices: dict[str, Tensor], weights: Weights, heads: int, join: int) -> dict:
    """(window, place in the image) -> encoded visible token; MAE, SimMIM and LoMaR differ in weights and view."""
    patch = weights["encoder.patch_embed.proj.weight"].shape[-1]
    rows, columns = image.shape[0] // patch, image.shape[1] // patch
    visible, kept = mask_indices["visible"], mask_indices["kept"]
    if "decoder.embed.weight" in weights:
        masks = kept.tolist() if "mask_tokens.token" in weights else None
        _, encoded = encode(image, visible.tolist(), weights, heads, masks)
        return {(0, i): encoded[i] for i in visible.tolist()}
    windows = mask_indices.get("window", torch.arange(rows * columns)[None])
    found = {}
    for w, window in enumerate(windows.tolist()):
        places = [divmod(place, columns) for place in window]
        shown, entered = (index.reshape(len(windows), -1)[w].tolist() for index in (visible, kept))
        hidden = [i for i in range(len(window)) if i not in shown]
        if "predictor.decoder.mask_token" in weights:
            entered = []
        _, encoded = encode_sequence(image, places, hidden, entered, join, weights, heads)
        found |= {(w, window[i]): encoded[i] for i in shown}
    return found


def head(rows: list[Tensor], weights: Weights, name: str, training: bool) -> list[Tensor]:
    """Linear, batch normalisation over the rows (or by running statistics), ReLU, linear."""
    hidden = [weights[f"{name}.0.weight"] @ row for row in rows]
    if training:
        mean = sum(hidden) / len(hidden)
        variance = sum((x - mean) ** 2 for x in hidden) / len(hidden)
    else:
        mean, variance = weights[f"{name}.1.running_mean"], weights[f"{name}.1.running_var"]
    scale = weights[f"{name}.1.weight"] / torch.sqrt(variance + 1e-5)
    normal = [(x - mean) * scale + weights[f"{name}.1.bias"] for x in hidden]
    return [weights[f"{name}.3.weight"] @ torch.clamp(x, min=0) for x in normal]


def teacher_rows(image: Tensor, weights: Weights, heads: int, pooled: bool) -> list[Tensor]:
    """The projected tokens of a whole picture, or their mean."""
    patch = weights["encoder.patch_embed.proj.weight"].shape[-1]
    rows, columns = image.shape[0] // patch, image.shape[1] // patch
    places = [divmod(i, columns) for i in range(rows * columns)]
    _, encoded = encode_sequence(image, places, [], [], 0, weights, heads)
    tokens = [encoded[i] for i in range(len(places))]
    return head([sum(tokens) / len(tokens)] if pooled else tokens, weights, "projector", training=False)


def distance(predicted: list[Tensor], targets: list[Tensor], loss: str, temperature: float) -> Tensor:
    """Table 4d's losses over rows of a batch."""
    if loss == "smooth_l1":
        gaps = torch.cat([(p - t).abs() for p, t in zip(predicted, targets, strict=True)])
        return torch.stack([0.5 * gap**2 if gap < 1 else gap - 0.5 for gap in gaps]).mean()
    p = [row / row.norm() for row in predicted]
    t = [row / row.norm() for row in targets]
    if loss == "cosine":
        return sum(2 - 2 * (a @ b) for a, b in zip(p, t, strict=True)) / len(p)
    total = 0.0
    for i, row in enumerate(p):
        logits = [row @ other / temperature for other in t]
        total = total - torch.log(torch.exp(logits[i]) / sum(math.e**logit for logit in logits))
    return total / len(p)


def context_loss(
    images: Tensor, mask_indices: dict[str, Tensor], weights: Weights, teacher: Weights, heads: int, pooled: bool, loss: str,
    temperature: float, join: int = 0,
) -> Tensor:  # fmt: skip
    """Symmetrised over the two pictures: images (B, 2, H, W, 3), view (B, 2, ...)."""
    method = {name.removeprefix("method."): w for name, w in weights.items() if name.startswith("method.")}
    terms = []
    for picture in (0, 1):
        rows, targets = [], []
        for b in range(len(images)):
            drawn = {name: index[b, picture] for name, index in mask_indices.items()}
            seen = visible_tokens(images[b, picture], drawn, method, heads, join)
            whole = teacher_rows(images[b, 1 - picture], teacher, heads, pooled)
            rows += [sum(seen.values()) / len(seen)] if pooled else list(seen.values())
            targets += whole if pooled else [whole[place] for _, place in seen]
        predicted = head(head(rows, weights, "projector", True), weights, "predictor", True)
        terms.append(distance(predicted, targets, loss, temperature))
    return (terms[0] + terms[1]) / 2
