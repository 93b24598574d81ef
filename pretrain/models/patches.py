"""Pixels <-> patches, and their normalization.

Shapes: B images or windows, H x W pixels of C channels, N patches of p x p pixels, P = p*p*C values of a patch, with
the channels last. Images for display are always red, green and blue: 3 in place of C.
"""

from functools import lru_cache

import torch
from torch import Tensor

from data.pixel_format import IMAGENET, RGB, Pixels

ALONE = "prediction alone"  # name of the image that shows predictions without any of the truth
_NO_PREDICTION = 255
_CONTRAST_SHOWN = 0.25  # share of the brightness range that one deviation spans, for values that are not bytes
_CONTRAST = 0.5  # standard deviation of standardized pixels, about that of photographs' patches


def values_per_patch(patch_size: int, channels: int = RGB.channels) -> int:
    """P = p*p*C."""
    return patch_size**2 * channels


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, H, W, C) images of any dtype -> (B, N, P) patches in raster order."""
    B, H, W, C = images.shape
    x = images.view(B, H // patch_size, patch_size, W // patch_size, patch_size, C)
    return x.transpose(2, 3).reshape(B, -1, patch_size * patch_size * C)


def unpatchify(patches: Tensor, grid: tuple[int, int], channels: int = RGB.channels) -> Tensor:
    """(B, N, P) patches of a grid -> (B, H, W, C); the inverse of `patchify`."""
    B, _, P = patches.shape
    patch_size = round((P // channels) ** 0.5)
    x = patches.view(B, *grid, patch_size, patch_size, channels)
    return x.transpose(2, 3).reshape(B, grid[0] * patch_size, grid[1] * patch_size, channels)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x (B, L, D) at index (B, K) -> (B, K, D)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def cut_windows(patches: Tensor, mask_indices: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Cuts each image's windows out of its patches.

    Args:
        patches: (B, N, P).
        mask_indices: `positions` (B, W, L), the grid position of each patch of each window, and others (B, W, ...).

    Returns:
        The windows' patches (B*W, L, P), and the indices as (B*W, ...).
    """
    windows = gather_tokens(patches, mask_indices["positions"].flatten(1))
    indices = {name: array.flatten(0, 1) for name, array in mask_indices.items()}
    return windows.view(*indices["positions"].shape, -1), indices


def _channel_values(values: tuple[float, ...], length: int, device: torch.device) -> Tensor:
    """The channels' values, repeated; made on the device, since a copy to it would block the host."""
    channel = torch.arange(length, device=device) % len(values)
    repeated = torch.full((length,), values[-1], device=device)
    for number in reversed(range(len(values) - 1)):
        repeated = torch.where(channel == number, values[number], repeated)
    return repeated


@lru_cache
def _pixel_statistics(length: int, device: torch.device, pixels: Pixels) -> tuple[Tensor, Tensor]:
    return _channel_values(pixels.mean, length, device), _channel_values(pixels.std, length, device)


def _mean_and_std(patches: Tensor, pixels: Pixels) -> tuple[Tensor, Tensor]:
    assert patches.shape[-1] % pixels.channels == 0, (patches.shape, pixels)
    # Compiled code computes them where they are used, and the compiler warns about the cache.
    statistics = _pixel_statistics.__wrapped__ if torch.compiler.is_compiling() else _pixel_statistics
    return statistics(patches.shape[-1], patches.device, pixels)


def normalize_pixels(patches: Tensor, pixels: Pixels = IMAGENET) -> Tensor:
    """(..., P) patches as loaded -> float32, each channel standardized by its statistics."""
    mean, std = _mean_and_std(patches, pixels)
    return (patches.float() / pixels.format.white - mean) / std


def to_pixels(patches: Tensor, pixels: Pixels = IMAGENET) -> Tensor:
    """Standardized pixels for display, like `show_patches`: (..., P) from `normalize_pixels` -> (..., p*p*3) uint8."""
    if pixels.dtype != "uint8":
        return _show_channels(_as_bytes(patches * _CONTRAST_SHOWN + 0.5), pixels)
    mean, std = _mean_and_std(patches, pixels)
    return _show_channels(_as_bytes(patches * std + mean), pixels)


def show_patches(patches: Tensor, pixels: Pixels) -> Tensor:
    """(..., P) patches, or (..., C) pixels, as loaded -> (..., p*p*3) uint8, or (..., 3), for display.

    The first three channels become red, green and blue; with one or two, the first becomes gray. Bytes are shown as
    they are; for other values, black and white are two deviations from the mean.
    """
    if pixels.dtype != "uint8":
        return to_pixels(normalize_pixels(patches, pixels), pixels)
    return _show_channels(patches, pixels)


def describe_shown(pixels: Pixels) -> str:
    """Says what `show_patches` shows, if that is not everything."""
    if pixels.format == RGB:
        return ""
    which = f"channels 1 to 3 of {pixels.channels} as red, green and blue"
    if pixels.channels < RGB.channels:
        which = "the only channel" if pixels.channels == 1 else f"channel 1 of {pixels.channels}, in gray"
    values = "" if pixels.dtype == "uint8" else ", with black and white two standard deviations from the mean"
    return f"The pictures show {which}{values}."


def _show_channels(patches: Tensor, pixels: Pixels) -> Tensor:
    if pixels.channels == RGB.channels:
        return patches
    values = patches.unflatten(-1, (-1, pixels.channels))
    first = values[..., :3] if pixels.channels > RGB.channels else values[..., :1].expand(*values.shape[:-1], 3)
    return first.flatten(-2)


def _as_bytes(values: Tensor) -> Tensor:
    return (values * 255).round().clamp(0, 255).byte()


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (unbiased, 1e-6 inside the root) of each patch: (..., P) -> (..., 1) twice."""
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (var + 1e-6).sqrt()


def normalize_patches(patches: Tensor) -> Tensor:
    """Normalizes each (..., P) fp32 patch by its own statistics: MAE's and LoMaR's "normalized pixels" target."""
    mean, std = patch_statistics(patches)
    return (patches - mean) / std


def pixel_target(patches: Tensor, norm_pix: bool, pixels: Pixels = IMAGENET) -> Tensor:
    """The target of (..., P) patches: standardized pixels, with `norm_pix` then by the patch's own statistics."""
    standardized = normalize_pixels(patches, pixels)
    return normalize_patches(standardized) if norm_pix else standardized


def predicted_pixels(
    prediction: Tensor, patches: Tensor, norm_pix: bool, pixels: Pixels = IMAGENET
) -> dict[str, Tensor]:
    """A prediction of `pixel_target` for display, by `to_pixels`.

    With `norm_pix`, a patch's mean and contrast are not predicted. `reconstruction` takes those of the true `patches`;
    `ALONE` takes the mean of all photographs, and one contrast for all patches.
    """
    prediction = prediction.float()
    if not norm_pix:
        return {"reconstruction": to_pixels(prediction, pixels)}
    mean, std = patch_statistics(normalize_pixels(patches, pixels))
    alone, whole = prediction * _CONTRAST, prediction * std + mean
    return {ALONE: to_pixels(alone, pixels), "reconstruction": to_pixels(whole, pixels)}


def frame_windows(images: Tensor, positions: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Draws a frame around a window of each image.

    Args:
        images: (B, H, W, 3) uint8.
        positions: (B, L) grid positions of the patches of one window.
        grid: rows and columns of an image's patches.
        patch_size: side of a patch in pixels.

    Returns:
        Copies, (B, H, W, 3) uint8.
    """
    framed, width = images.clone(), max(images.shape[1] // 56, 1)
    yellow = torch.tensor([255, 220, 0], dtype=torch.uint8, device=images.device)
    for image, window in zip(framed, positions, strict=True):
        top, left = (int(side.min()) * patch_size for side in (window // grid[1], window % grid[1]))
        bottom, right = ((int(side.max()) + 1) * patch_size for side in (window // grid[1], window % grid[1]))
        inside = image[top + width : bottom - width, left + width : right - width].clone()
        image[top:bottom, left:right] = yellow
        image[top + width : bottom - width, left + width : right - width] = inside
    return framed


def render_predictions(
    patches: Tensor, masked: Tensor, predicted: dict[str, Tensor], grid: tuple[int, int]
) -> dict[str, Tensor]:
    """Images of the model's input and of its predictions.

    Args:
        patches: (B, N, P) uint8, all patches of a grid, from `show_patches`.
        masked: (B, M) positions of the masked ones.
        predicted: (B, M, P) uint8, pixels to show at the masked positions, by name.
        grid: rows and columns.

    Returns:
        `masked`, with gray at the masked positions, and an image for each name: (B, H, W, 3) uint8. `ALONE` is white at
        the other positions; it is made from `reconstruction` if that needs nothing of the truth.
    """
    index = masked.unsqueeze(-1).expand(-1, -1, patches.shape[-1])
    rendered = {"masked": patches.scatter(1, index, 128)}
    alone = predicted.get(ALONE, predicted.get("reconstruction"))
    if alone is not None:
        rendered[ALONE] = torch.full_like(patches, _NO_PREDICTION).scatter(1, index, alone)
    others = {name: pixels for name, pixels in predicted.items() if name != ALONE}
    rendered |= {name: patches.scatter(1, index, pixels) for name, pixels in others.items()}
    return {name: unpatchify(image, grid) for name, image in rendered.items()}
