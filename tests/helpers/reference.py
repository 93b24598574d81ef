"""The methods spelled out: loops over images, windows, queries and keys, in float64, in the papers' order.

It shares no code with `pretrain`: only the names of the weights and the view arrays that say what was drawn. It is
slow and meant to be read beside the papers; `test_lomar.py` and `test_methods.py` hold the real models against it.
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


def relative_buckets(places: list[tuple[int, int]]) -> list[list[int]]:
    """Of a class token and patches at these places."""
    inner = [[CLASS_BUCKET] + [bucket(query, key) for key in places] for query in places]
    return [[CLASS_BUCKET] * (1 + len(places)), *inner]


def encode_sequence(
    image: Tensor, places: list[tuple[int, int]], masked: list[int], kept: list[int], join: int, weights: Weights,
    heads: int,
) -> tuple[Tensor, dict[int, Tensor]]:  # fmt: skip
    """One window or image: class token, visible patches, and from block `join` on mask tokens at the kept places.

    Args:
        image: (H, W, 3) uint8.
        places: (row, column) of the sequence's patches in the image's grid, in raster order.
        masked: which of them are masked.
        kept: which of the masked ones enter the encoder.

    Returns:
        The encoded class token, and the encoded patches that entered, by their number in the sequence.
    """
    patch = weights["encoder.patch_embed.proj.weight"].shape[-1]
    relative = "encoder.blocks.0.attn.rpe_k.lookup_table_weight" in weights

    def with_position(token: Tensor, i: int) -> Tensor:
        return token if relative else token + position(*places[i], len(token))

    entered = [i for i in range(len(places)) if i not in masked]
    tokens = [weights["encoder.cls_token"][0, 0]]
    tokens += [with_position(embed(cut_patch(image, *places[i], patch), weights), i) for i in entered]
    buckets = relative_buckets([places[i] for i in entered]) if relative else None
    for n in range(join):
        tokens = block(tokens, buckets, weights, f"encoder.blocks.{n}", heads)
    by_place = dict(zip(entered, tokens[1:], strict=True))
    by_place |= {i: with_position(weights["predictor.mask_token"][0, 0], i) for i in kept}
    entered = sorted(by_place)
    tokens = [tokens[0], *(by_place[i] for i in entered)]
    buckets = relative_buckets([places[i] for i in entered]) if relative else None
    encoded = transformer(tokens, buckets, weights, "encoder", heads, join)
    return encoded[0], dict(zip(entered, encoded[1:], strict=True))


def fill(
    tokens: dict[int, Tensor], columns: int, rows: int, weights: Weights, name: str, heads: int
) -> dict[int, Tensor]:
    """PR-MIM's spatial aggregation: a thrown token is made out of the tokens around it; Table 12's ways to do so."""
    zero = torch.zeros_like(next(iter(tokens.values())))
    grid = [tokens.get(i, zero) for i in range(rows * columns)]
    if f"{name}.aggregate.block.norm1.weight" in weights:
        placed = [x + position(*divmod(i, columns), len(x)) for i, x in enumerate(grid)]
        made = block(placed, None, weights, f"{name}.aggregate.block", heads)
    elif f"{name}.aggregate.mlp.fc1.weight" in weights:
        made = convolve(grid, columns, rows, weights, f"{name}.aggregate.conv")
        for i, x in enumerate(made):
            hidden = gelu(
                linear(layer_norm(x, weights, f"{name}.aggregate.norm"), weights, f"{name}.aggregate.mlp.fc1")
            )
            made[i] = grid[i] + linear(hidden, weights, f"{name}.aggregate.mlp.fc2")
    elif f"{name}.aggregate.conv.weight" in weights:
        made = convolve(grid, columns, rows, weights, f"{name}.aggregate.conv")
    else:
        made = average(tokens, columns, rows, zero)
    return dict(enumerate(made)) | tokens


def convolve(grid: list[Tensor], columns: int, rows: int, weights: Weights, name: str) -> list[Tensor]:
    """Channel by channel; what lies outside of the grid is zero."""
    kernel, made = weights[f"{name}.weight"], []
    reach = kernel.shape[-1] // 2
    for row in range(rows):
        for col in range(columns):
            total = weights[f"{name}.bias"]
            for y in range(max(row - reach, 0), min(row + reach + 1, rows)):
                for x in range(max(col - reach, 0), min(col + reach + 1, columns)):
                    total = total + kernel[:, 0, y - row + reach, x - col + reach] * grid[y * columns + x]
            made.append(total)
    return made


def average(tokens: dict[int, Tensor], columns: int, rows: int, zero: Tensor) -> list[Tensor]:
    """Of the known ones among 3 x 3 neighbours; zero where there are none."""
    made = []
    for row in range(rows):
        for col in range(columns):
            near = [tokens[i] for i in tokens if max(abs(i // columns - row), abs(i % columns - col)) <= 1]
            made.append(sum(near) / len(near) if near else zero)
    return made


def predict(encoded: dict[int, Tensor], columns: int, rows: int, weights: Weights, heads: int) -> dict[int, Tensor]:
    """The head on every token of a sequence, thrown ones included."""
    if "predictor.norm.weight" not in weights:
        return {i: linear(token, weights, "predictor.head") for i, token in encoded.items()}
    filled = fill(encoded, columns, rows, weights, "predictor.fill", heads)
    return {i: linear(layer_norm(x, weights, "predictor.norm"), weights, "predictor.head") for i, x in filled.items()}


def transformer(
    tokens: list[Tensor], buckets: list[list[int]] | None, weights: Weights, name: str, heads: int, start: int = 0
):
    """The blocks of an encoder or decoder from `start` on, then its last norm."""
    depth = len({key.split(".")[2] for key in weights if key.startswith(f"{name}.blocks.")})
    for n in range(start, depth):
        tokens = block(tokens, buckets, weights, f"{name}.blocks.{n}", heads)
    return [layer_norm(x, weights, f"{name}.norm") for x in tokens]


def transformer_decoder(
    first: Tensor, seen: dict[int, Tensor], kept: list[int], grid: tuple[int, int], weights: Weights, heads: int,
    name: str = "decoder",
) -> dict[int, Tensor]:  # fmt: skip
    """The class token, the encoded tokens and mask tokens where they are kept; the prediction of every patch."""
    narrow = {i: linear(x, weights, f"{name}.embed") for i, x in seen.items()}
    if f"{name}.mask_token" in weights:
        narrow |= dict.fromkeys(kept, weights[f"{name}.mask_token"][0, 0])
    entered = sorted(narrow)
    tokens = [linear(first, weights, f"{name}.embed")]
    tokens += [narrow[i] + position(*divmod(i, grid[1]), len(narrow[i])) for i in entered]
    depth = len({key.split(f"{name}.blocks.")[1].split(".")[0] for key in weights if key.startswith(f"{name}.blocks.")})
    for n in range(depth):
        tokens = block(tokens, None, weights, f"{name}.blocks.{n}", heads)
    decoded = dict(zip(entered, tokens[1:], strict=True))
    if len(decoded) < grid[0] * grid[1]:
        decoded = fill(decoded, grid[1], grid[0], weights, f"{name}.fill", heads)
    return {i: linear(layer_norm(x, weights, f"{name}.norm"), weights, f"{name}.pred") for i, x in decoded.items()}


def target_of(pixels: Tensor, norm_pix: bool) -> Tensor:
    """What a masked patch is compared with: its pixels, by its own mean and unbiased variance where `norm_pix`."""
    if not norm_pix:
        return pixels
    mean = pixels.sum() / len(pixels)
    variance = ((pixels - mean) ** 2).sum() / (len(pixels) - 1)
    return (pixels - mean) / torch.sqrt(variance + 1e-6)


def lomar_loss(
    images: Tensor, mask_indices: dict[str, Tensor], weights: Weights, heads: int, norm_pix: bool, join: int = 0,
    decoder_heads: int = 1,
) -> Tensor:  # fmt: skip
    """Mean squared error over all masked patches of all windows of all images.

    Args:
        images: (B, H, W, 3) uint8.
        view: `window` (B, W, K*K) grid positions, `masked` (B, W, M) and `kept` (B, W, K) positions within the window.
        weights: the state dict of `LoMaR`, in float64.
        heads: of the encoder.
        norm_pix: predict normalised patches.
        join: the block at which mask tokens enter.
        decoder_heads: where the weights have a decoder, into which mask tokens enter instead.
    """
    patch = weights["encoder.patch_embed.proj.weight"].shape[-1]
    columns = images.shape[2] // patch
    side = math.isqrt(mask_indices["window"].shape[-1])
    errors = []
    for b, image in enumerate(images):
        for w, window in enumerate(mask_indices["window"][b].tolist()):
            masked, kept = mask_indices["masked"][b, w].tolist(), mask_indices["kept"][b, w].tolist()
            places = [divmod(place, columns) for place in window]
            if "predictor.decoder.mask_token" in weights:
                first, seen = encode_sequence(image, places, masked, [], 0, weights, heads)
                name, grid = "predictor.decoder", (side, side)
                predicted = transformer_decoder(first, seen, kept, grid, weights, decoder_heads, name)
            else:
                _, encoded = encode_sequence(image, places, masked, kept, join, weights, heads)
                predicted = predict(encoded, side, side, weights, heads)
            for i in masked:
                target = target_of(cut_patch(image, *places[i], patch), norm_pix)
                errors.append(((predicted[i] - target) ** 2).sum() / len(target))
    return sum(errors) / len(errors)


def simmim_loss(images: Tensor, mask_indices: dict[str, Tensor], weights: Weights, heads: int) -> Tensor:
    """One window that is the whole image; mean absolute error of the masked patches' pixels."""
    patch = weights["encoder.patch_embed.proj.weight"].shape[-1]
    rows, columns = images.shape[1] // patch, images.shape[2] // patch
    places = [divmod(i, columns) for i in range(rows * columns)]
    errors = []
    for image, masked, kept in zip(images, mask_indices["masked"].tolist(), mask_indices["kept"].tolist(), strict=True):
        _, encoded = encode_sequence(image, places, masked, kept, 0, weights, heads)
        predicted = predict(encoded, columns, rows, weights, heads)
        for i in masked:
            target = cut_patch(image, *places[i], patch)
            errors.append((predicted[i] - target).abs().sum() / len(target))
    return sum(errors) / len(errors)
