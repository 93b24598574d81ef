"""Tests of patchifying, pixel standardization and patch normalization."""

import pytest
import torch

from pretrain.models.patches import (
    gather_tokens,
    normalize_patches,
    normalize_pixels,
    patch_statistics,
    patchify,
    to_pixels,
    unpatchify,
)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 12, 20, 3), generator=torch.Generator().manual_seed(0)).byte()


def test_patches_are_in_raster_order_with_channels_last(images: torch.Tensor):
    patches = patchify(images, 4)
    assert patches.shape == (2, 3 * 5, 48)
    assert patches.dtype == torch.uint8
    for row in range(3):
        for col in range(5):
            square = images[:, row * 4 : row * 4 + 4, col * 4 : col * 4 + 4]
            assert torch.equal(patches[:, row * 5 + col], square.reshape(2, -1))


def test_unpatchify_inverts_patchify(images: torch.Tensor):
    assert torch.equal(unpatchify(patchify(images, 4), (3, 5)), images)


def test_gather_tokens_indexes_each_image_separately():
    x = torch.arange(24).view(2, 4, 3)
    assert torch.equal(gather_tokens(x, torch.tensor([[3, 0], [1, 1]])), torch.stack([x[0, [3, 0]], x[1, [1, 1]]]))


def test_pixels_are_standardized_per_channel_and_restored():
    bytes_of_patches = torch.arange(256, dtype=torch.uint8).repeat(3, 1).T.reshape(64, 12)  # all values, all channels
    normal = normalize_pixels(bytes_of_patches)
    assert normal.dtype == torch.float32
    mean, std = (torch.tensor(v).repeat(4) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(normal, (bytes_of_patches / 255 - mean) / std)
    assert torch.equal(to_pixels(normal), bytes_of_patches)
    assert to_pixels(torch.full((1, 12), 99.0)).eq(255).all()
    assert to_pixels(torch.full((1, 12), -99.0)).eq(0).all()


def test_patches_are_normalized_by_mean_and_unbiased_variance():
    patches = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(0)) * 3 + 2
    normal = normalize_patches(patches)
    for i in range(3):
        for j in range(5):
            values = patches[i, j].double()
            mean = values.sum() / 48
            variance = ((values - mean) ** 2).sum() / 47
            torch.testing.assert_close(
                normal[i, j].double(), (values - mean) / (variance + 1e-6).sqrt(), atol=1e-5, rtol=0
            )
    mean, std = patch_statistics(patches)
    torch.testing.assert_close(normal * std + mean, patches)


def test_flat_patches_are_normalized_without_division_by_zero():
    flat = torch.full((1, 48), 0.7)
    mean, std = patch_statistics(flat)
    assert std.item() == pytest.approx(1e-3, rel=1e-4)
    assert mean.item() == pytest.approx(0.7)
    assert normalize_patches(flat).abs().max() < 1e-3
