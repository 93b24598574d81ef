"""Reference implementations of the methods: loops over images, windows, queries and keys in float64.

They share no code with `pretrain`, only the names of the weights and the index arrays of what was drawn. They are slow
and meant to be read with the papers. `test_lomar.py` and `test_methods.py` compare the models with them.
"""

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]

PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASS_BUCKET = 49
SHARED_BIAS = "encoder.rel_pos_bias.relative_position_bias_table"
ALPHA, BETA, GAMMA = 1.9, 3.8, 15.2


def axis_bucket(offset: float) -> int:
    """iRPE's piecewise index along one axis: exact near zero, logarithmic further out, -3..3."""
    if abs(offset) <= ALPHA:
        return round(offset)
    logarithmic = round(ALPHA + math.log(abs(offset) / ALPHA) / math.log(GAMMA / ALPHA) * (BETA - ALPHA))
    return int(math.copysign(min(logarithmic, BETA), offset))


def bucket(query: tuple[int, int], key: tuple[int, int]) -> int:
    """Return the "product" bucket of two patches at (row, column)."""
    return (axis_bucket(query[0] - key[0]) + 3) * 7 + axis_bucket(query[1] - key[1]) + 3


def cut_patch(image: Tensor, row: int, col: int, patch: int) -> Tensor:
    """Return the pixels of one patch as a vector: rows, then columns, then RGB, with normalized channels."""
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


def position_embedding(row: int, col: int, dim: int) -> Tensor:
    """MAE's fixed position of a patch, for the ablation without relative position."""
    quarter = dim // 4
    angles = [(coordinate / 10000 ** (i / quarter), i) for coordinate in (col, row) for i in range(quarter)]
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
    """Every query against every key; the relative term uses the query before scaling."""
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
                if buckets is not None and SHARED_BIAS in weights:
                    logit = logit + weights[SHARED_BIAS][buckets[i][j], head]
                elif buckets is not None:
                    logit = logit + q @ weights[f"{name}.rpe_k.lookup_table_weight"][0, :, buckets[i][j]]
                logits.append(logit)
            exponents = [torch.exp(logit) for logit in logits]
            total = sum(exponents)
            joined.append(sum(e / total * qkv[j][2 * dim :][own] for j, e in enumerate(exponents)))
        outputs.append(linear(torch.cat(joined), weights, f"{name}.proj"))
    return outputs


def block(tokens: list[Tensor], buckets: list[list[int]] | None, weights: Weights, name: str, heads: int):
    """Pre-norm: each half adds its output for the normalized stream to the residual stream."""
    attended = attention(
        [layer_norm(x, weights, f"{name}.norm1") for x in tokens], buckets, weights, f"{name}.attn", heads
    )
    scales = [weights.get(f"{name}.ls{half}.gamma", 1.0) for half in (1, 2)]
    tokens = [x + scales[0] * y for x, y in zip(tokens, attended, strict=True)]
    result = []
    for x in tokens:
        hidden = gelu(linear(layer_norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1"))
        result.append(x + scales[1] * linear(hidden, weights, f"{name}.mlp.fc2"))
    return result


def relative_buckets(patches: list[tuple[int, int]], prefix: int = 1) -> list[list[int]]:
    """Buckets of `prefix` tokens (a class token, perhaps registers) and patches at these (row, column)."""
    inner = [[CLASS_BUCKET] * prefix + [bucket(query, key) for key in patches] for query in patches]
    return [[CLASS_BUCKET] * (prefix + len(patches))] * prefix + inner


def bias_rows(patches: list[tuple[int, int]], prefix: int, grid: tuple[int, int]) -> list[list[int]]:
    """BEiT's numbering: offsets in raster order, then the three kinds of pairs with a class token."""
    rows, cols = grid
    offsets = (2 * rows - 1) * (2 * cols - 1)
    inner = [
        [offsets + 1] * prefix + [(q[0] - k[0] + rows - 1) * (2 * cols - 1) + q[1] - k[1] + cols - 1 for k in patches]
        for q in patches
    ]
    return [[offsets + 2] * prefix + [offsets] * len(patches)] * prefix + inner


def prefix_tokens(weights: Weights) -> list[Tensor]:
    """The class token, at its learned position if positions are learned, and the registers."""
    class_token = weights["encoder.cls_token"][0, 0]
    if "encoder.pos_embed" in weights:
        class_token = class_token + weights["encoder.pos_embed"][0, 0]
    return [class_token, *weights.get("encoder.reg_token", class_token[None, :0])[0]]


def absolute_position(row: int, col: int, columns: int, token: Tensor, weights: Weights) -> Tensor:
    """The learned position of a patch, or MAE's fixed one."""
    if "encoder.pos_embed" in weights:
        return weights["encoder.pos_embed"][0, 1 + row * columns + col]
    return position_embedding(row, col, len(token))


def encode_sequence(
    image: Tensor, patches: list[tuple[int, int]], masked: list[int], kept: list[int], mask_token_block: int,
    weights: Weights, heads: int,
) -> tuple[list[Tensor], dict[int, Tensor]]:  # fmt: skip
    """Encode a window or image: prefix tokens, visible patches, and kept mask tokens from `mask_token_block` on.

    Args:
        image: (H, W, 3) uint8.
        patches: (row, column) of the sequence's patches in the image's grid, in raster order.
        masked: indices of the masked patches.
        kept: indices of the masked patches that enter the encoder.

    Returns:
        The encoded prefix tokens, and the encoded patches that entered, by their index in the sequence.
    """
    patch = weights["encoder.patch_embed.proj.weight"].shape[-1]
    grid = image.shape[0] // patch, image.shape[1] // patch
    relative = "encoder.blocks.0.attn.rpe_k.lookup_table_weight" in weights
    prefix = len(prefix_tokens(weights))

    def with_position(token: Tensor, i: int) -> Tensor:
        if relative or SHARED_BIAS in weights:
            return token
        return token + absolute_position(*patches[i], grid[1], token, weights)

    def pairs(indices: list[int]) -> list[list[int]] | None:
        places = [patches[i] for i in indices]
        if SHARED_BIAS in weights:
            return bias_rows(places, prefix, grid)
        return relative_buckets(places, prefix) if relative else None

    entered = [i for i in range(len(patches)) if i not in masked]
    tokens = prefix_tokens(weights)
    tokens += [with_position(embed(cut_patch(image, *patches[i], patch), weights), i) for i in entered]
    for n in range(mask_token_block):
        tokens = block(tokens, pairs(entered), weights, f"encoder.blocks.{n}", heads)
    by_index = dict(zip(entered, tokens[prefix:], strict=True))
    by_index |= {i: with_position(weights["predictor.mask_token"][0, 0], i) for i in kept}
    entered = sorted(by_index)
    tokens = [*tokens[:prefix], *(by_index[i] for i in entered)]
    encoded = transformer(tokens, pairs(entered), weights, "encoder", heads, mask_token_block)
    return encoded[:prefix], dict(zip(entered, encoded[prefix:], strict=True))


def encoder_streams(
    image: Tensor, patches: list[tuple[int, int]], visible: list[int], weights: Weights, heads: int
) -> list[list[Tensor]]:
    """Return the prefix tokens and visible patches before the first block and after each block."""
    patch = weights["encoder.patch_embed.proj.weight"].shape[-1]
    relative = "encoder.blocks.0.attn.rpe_k.lookup_table_weight" in weights
    tokens, columns = prefix_tokens(weights), image.shape[1] // patch
    buckets = relative_buckets([patches[i] for i in visible], len(tokens)) if relative else None
    for i in visible:
        token = embed(cut_patch(image, *patches[i], patch), weights)
        tokens.append(token if relative else token + absolute_position(*patches[i], columns, token, weights))
    streams = [tokens]
    for n in range(depth_of(weights, "encoder")):
        streams.append(block(streams[-1], buckets, weights, f"encoder.blocks.{n}", heads))
    return streams


def depth_of(weights: Weights, name: str) -> int:
    return len({key.split(f"{name}.blocks.")[1].split(".")[0] for key in weights if key.startswith(f"{name}.blocks.")})


def aggregate(
    tokens: dict[int, Tensor], columns: int, rows: int, weights: Weights, name: str, heads: int
) -> dict[int, Tensor]:
    """PR-MIM's spatial aggregation, of the kinds in Table 12: a thrown token is computed from its neighbors."""
    zero = torch.zeros_like(next(iter(tokens.values())))
    grid = [tokens.get(i, zero) for i in range(rows * columns)]
    if f"{name}.aggregate.block.norm1.weight" in weights:
        with_positions = [x + position_embedding(*divmod(i, columns), len(x)) for i, x in enumerate(grid)]
        output = block(with_positions, None, weights, f"{name}.aggregate.block", heads)
    elif f"{name}.aggregate.mlp.fc1.weight" in weights:
        output = convolve(grid, columns, rows, weights, f"{name}.aggregate.conv")
        for i, x in enumerate(output):
            hidden = gelu(
                linear(layer_norm(x, weights, f"{name}.aggregate.norm"), weights, f"{name}.aggregate.mlp.fc1")
            )
            output[i] = grid[i] + linear(hidden, weights, f"{name}.aggregate.mlp.fc2")
    elif f"{name}.aggregate.conv.weight" in weights:
        output = convolve(grid, columns, rows, weights, f"{name}.aggregate.conv")
    else:
        output = average(tokens, columns, rows, zero)
    return dict(enumerate(output)) | tokens


def convolve(grid: list[Tensor], columns: int, rows: int, weights: Weights, name: str) -> list[Tensor]:
    """Depthwise convolution with zeros outside the grid."""
    kernel, output = weights[f"{name}.weight"], []
    reach = kernel.shape[-1] // 2
    for row in range(rows):
        for col in range(columns):
            total = weights[f"{name}.bias"]
            for y in range(max(row - reach, 0), min(row + reach + 1, rows)):
                for x in range(max(col - reach, 0), min(col + reach + 1, columns)):
                    total = total + kernel[:, 0, y - row + reach, x - col + reach] * grid[y * columns + x]
            output.append(total)
    return output


def average(tokens: dict[int, Tensor], columns: int, rows: int, zero: Tensor) -> list[Tensor]:
    """Average the given tokens among 3 x 3 neighbors; zero if there are none."""
    output = []
    for row in range(rows):
        for col in range(columns):
            near = [tokens[i] for i in tokens if max(abs(i // columns - row), abs(i % columns - col)) <= 1]
            output.append(sum(near) / len(near) if near else zero)
    return output


def predict(encoded: dict[int, Tensor], columns: int, rows: int, weights: Weights, heads: int) -> dict[int, Tensor]:
    """Apply the head to every token of a sequence, including thrown ones."""
    if "predictor.norm.weight" not in weights:
        return {i: linear(token, weights, "predictor.head") for i, token in encoded.items()}
    filled = aggregate(encoded, columns, rows, weights, "predictor.aggregation", heads)
    return {i: linear(layer_norm(x, weights, "predictor.norm"), weights, "predictor.head") for i, x in filled.items()}


def transformer(
    tokens: list[Tensor], buckets: list[list[int]] | None, weights: Weights, name: str, heads: int, start: int = 0
):
    """Apply the blocks of an encoder or decoder from `start` on, then its last norm."""
    depth = len({key.split(".")[2] for key in weights if key.startswith(f"{name}.blocks.")})
    for n in range(start, depth):
        tokens = block(tokens, buckets, weights, f"{name}.blocks.{n}", heads)
    return [layer_norm(x, weights, f"{name}.norm") for x in tokens]


def transformer_decoder(
    prefix: list[Tensor], encoded: dict[int, Tensor], kept: list[int], grid: tuple[int, int], weights: Weights,
    heads: int, name: str = "decoder", fill: bool = True,
) -> dict[int, Tensor]:  # fmt: skip
    """Decode prefix tokens, encoded tokens and mask tokens of kept patches; returns the prediction of every patch.

    Without `fill`, returns only the predictions of patches that have a token.
    """
    narrow = {i: linear(x, weights, f"{name}.embed") for i, x in encoded.items()}
    if f"{name}.mask_token" in weights:
        narrow |= dict.fromkeys(kept, weights[f"{name}.mask_token"][0, 0])
    entered = sorted(narrow)
    tokens = [linear(token, weights, f"{name}.embed") for token in prefix]
    tokens += [narrow[i] + position_embedding(*divmod(i, grid[1]), len(narrow[i])) for i in entered]
    for n in range(depth_of(weights, name)):
        tokens = block(tokens, None, weights, f"{name}.blocks.{n}", heads)
    decoded = dict(zip(entered, tokens[len(prefix) :], strict=True))
    if fill and len(decoded) < grid[0] * grid[1]:
        decoded = aggregate(decoded, grid[1], grid[0], weights, f"{name}.aggregation", heads)
    return {i: linear(layer_norm(x, weights, f"{name}.norm"), weights, f"{name}.pred") for i, x in decoded.items()}


def target_of(pixels: Tensor, norm_pix: bool) -> Tensor:
    """The target of a masked patch: its pixels, normalized by their own mean and unbiased variance if `norm_pix`."""
    if not norm_pix:
        return pixels
    mean = pixels.sum() / len(pixels)
    variance = ((pixels - mean) ** 2).sum() / (len(pixels) - 1)
    return (pixels - mean) / torch.sqrt(variance + 1e-6)


def lomar_loss(
    images: Tensor, mask_indices: dict[str, Tensor], weights: Weights, heads: int, norm_pix: bool,
    mask_token_block: int = 0, decoder_heads: int = 1,
) -> Tensor:  # fmt: skip
    """Mean squared error over all masked patches of all windows of all images.

    Args:
        images: (B, H, W, 3) uint8.
        mask_indices: `positions` (B, W, K*K) in the grid, `masked` (B, W, M) and `kept` (B, W, K) in the window.
        weights: the state dict of `LoMaR`, in float64.
        heads: number of heads of the encoder.
        norm_pix: predict normalized patches.
        mask_token_block: the block before which mask tokens enter.
        decoder_heads: number of heads of the decoder; if the weights have one, mask tokens enter it instead.
    """
    patch = weights["encoder.patch_embed.proj.weight"].shape[-1]
    columns = images.shape[2] // patch
    side = math.isqrt(mask_indices["positions"].shape[-1])
    errors = []
    for b, image in enumerate(images):
        for w, window in enumerate(mask_indices["positions"][b].tolist()):
            masked, kept = mask_indices["masked"][b, w].tolist(), mask_indices["kept"][b, w].tolist()
            patches = [divmod(position, columns) for position in window]
            if "predictor.decoder.mask_token" in weights:
                prefix, encoded = encode_sequence(image, patches, masked, [], 0, weights, heads)
                name, grid = "predictor.decoder", (side, side)
                predicted = transformer_decoder(prefix, encoded, kept, grid, weights, decoder_heads, name)
            else:
                _, encoded = encode_sequence(image, patches, masked, kept, mask_token_block, weights, heads)
                predicted = predict(encoded, side, side, weights, heads)
            for i in masked:
                target = target_of(cut_patch(image, *patches[i], patch), norm_pix)
                errors.append(((predicted[i] - target) ** 2).sum() / len(target))
    return sum(errors) / len(errors)


def simmim_loss(images: Tensor, mask_indices: dict[str, Tensor], weights: Weights, heads: int) -> Tensor:
    """Mean absolute error of the masked patches' pixels, with the whole image as one window."""
    patch = weights["encoder.patch_embed.proj.weight"].shape[-1]
    rows, columns = images.shape[1] // patch, images.shape[2] // patch
    patches = [divmod(i, columns) for i in range(rows * columns)]
    errors = []
    for image, masked, kept in zip(images, mask_indices["masked"].tolist(), mask_indices["kept"].tolist(), strict=True):
        _, encoded = encode_sequence(image, patches, masked, kept, 0, weights, heads)
        predicted = predict(encoded, columns, rows, weights, heads)
        for i in masked:
            target = cut_patch(image, *patches[i], patch)
            errors.append((predicted[i] - target).abs().sum() / len(target))
    return sum(errors) / len(errors)
