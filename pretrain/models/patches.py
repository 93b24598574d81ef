"""Pixels <-> patches, and their normalization.

Shapes: B images or windows, H x W pixels, N patches of p x p pixels, P = p*p*3 values of a patch, channels last.
"""

from functools import lru_cache

import torch
from torch import Tensor

from data.decode import CHANNELS

ALONE = "prediction alone"  # the name of the image that shows predictions without anything of the truth
_NO_PREDICTION = 255
_CONTRAST = 0.5  # standard deviation of standardized pixels, about that of photographs' patches

# ImageNet's mean and standard deviation of RGB in 0..1.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def values_per_patch(patch_size: int) -> int:
    """P = p*p*3."""
    return patch_size**2 * CHANNELS


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, H, W, 3) images of any dtype -> (B, N, P) patches in raster order."""
    B, H, W, C = images.shape
    x = images.view(B, H // patch_size, patch_size, W // patch_size, patch_size, C)
    return x.transpose(2, 3).reshape(B, -1, patch_size * patch_size * C)


def unpatchify(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N, P) patches of a grid -> (B, H, W, 3); the inverse of `patchify`."""
    B, _, P = patches.shape
    patch_size = round((P // CHANNELS) ** 0.5)
    x = patches.view(B, *grid, patch_size, patch_size, CHANNELS)
    return x.transpose(2, 3).reshape(B, grid[0] * patch_size, grid[1] * patch_size, CHANNELS)


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


def _channel_values(values: tuple[float, float, float], length: int, device: torch.device) -> Tensor:
    """The values of red, green and blue, repeated; made on the device, since a copy to it would block the host."""
    channel = torch.arange(length, device=device) % CHANNELS
    red, green, blue = values
    return torch.where(channel == 0, red, torch.where(channel == 1, green, blue))


@lru_cache
def _pixel_statistics(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return _channel_values(_MEAN, length, device), _channel_values(_STD, length, device)


def _mean_and_std(patches: Tensor) -> tuple[Tensor, Tensor]:
    # Compiled code computes them where they are used, and its compiler warns of the cache.
    statistics = _pixel_statistics.__wrapped__ if torch.compiler.is_compiling() else _pixel_statistics
    return statistics(patches.shape[-1], patches.device)


def normalize_pixels(patches: Tensor) -> Tensor:
    """(..., P) uint8 patches -> float32, each channel standardized by ImageNet's statistics."""
    mean, std = _mean_and_std(patches)
    return (patches.float() / 255 - mean) / std


def to_pixels(patches: Tensor) -> Tensor:
    """The inverse of `normalize_pixels`, rounded and clamped to uint8."""
    mean, std = _mean_and_std(patches)
    return ((patches * std + mean) * 255).round().clamp(0, 255).byte()


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (unbiased, 1e-6 inside the root) of each patch: (..., P) -> (..., 1) twice."""
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (var + 1e-6).sqrt()


def normalize_patches(patches: Tensor) -> Tensor:
    """Each (..., P) fp32 patch by its own statistics: MAE's and LoMaR's "normalized pixels" target."""
    mean, std = patch_statistics(patches)
    return (patches - mean) / std


def pixel_target(patches: Tensor, norm_pix: bool) -> Tensor:
    """The target of (..., P) uint8 patches: standardized pixels, with `norm_pix` by the patch's own statistics."""
    pixels = normalize_pixels(patches)
    return normalize_patches(pixels) if norm_pix else pixels


def predicted_pixels(prediction: Tensor, patches: Tensor, norm_pix: bool) -> dict[str, Tensor]:
    """A prediction of `pixel_target` as uint8 pixels.

    With `norm_pix` nothing is predicted of a patch's mean and contrast. `reconstruction` takes those of the true
    `patches`; `ALONE` takes the mean of all photographs, and one contrast for all patches.
    """
    prediction = prediction.float()
    if not norm_pix:
        return {"reconstruction": to_pixels(prediction)}
    mean, std = patch_statistics(normalize_pixels(patches))
    return {ALONE: to_pixels(prediction * _CONTRAST), "reconstruction": to_pixels(prediction * std + mean)}


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
        patches: (B, N, P) uint8, all patches of a grid.
        masked: (B, M) positions of the masked ones.
        predicted: (B, M, P) uint8, pixels to show at the masked positions, by name.
        grid: rows and columns.

    Returns:
        `masked`, with gray at the masked positions, and an image for each name: (B, H, W, 3) uint8. In `ALONE`, which
        is also made of a `reconstruction` that needs nothing of the truth, other positions are white.
    """
    index = masked.unsqueeze(-1).expand(-1, -1, patches.shape[-1])
    rendered = {"masked": patches.scatter(1, index, 128)}
    alone = predicted.get(ALONE, predicted.get("reconstruction"))
    if alone is not None:
        rendered[ALONE] = torch.full_like(patches, _NO_PREDICTION).scatter(1, index, alone)
    others = {name: pixels for name, pixels in predicted.items() if name != ALONE}
    rendered |= {name: patches.scatter(1, index, pixels) for name, pixels in others.items()}
    return {name: unpatchify(image, grid) for name, image in rendered.items()}
