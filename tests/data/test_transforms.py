import math

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from data.transforms import center_crop, flip_decision, random_resized_crop

SHAPES = [(500, 375), (64, 300), (300, 40), (9, 9)]


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_crops_lie_inside_and_keep_the_limits(width: int, height: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        left, top, right, bottom = random_resized_crop(rng, width, height)
        w, h = right - left, bottom - top
        assert left >= 0
        assert top >= 0
        assert right <= width
        assert bottom <= height
        assert min(w, h) >= 1
        assert (w - 1) / (h + 1) < 4 / 3  # sides are rounded to whole pixels
        assert (w + 1) / (h - 1 or 0.5) > 3 / 4
        assert (w + 1) * (h + 1) >= 0.2 * width * height or max(width, height) > 4 * min(width, height)


@pytest.mark.parametrize(("width", "height"), SHAPES[:3])
def test_same_distribution_as_torchvision(width: int, height: int) -> None:
    """Deciles of place, area and shape over 3000 draws each."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    ours, theirs = [], []
    for _ in range(3000):
        left, top, right, bottom = random_resized_crop(rng, width, height, scale=(0.2, 1.0))
        ours.append((left, top, right - left, bottom - top))
        top, left, h, w = RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3])
        theirs.append((left, top, w, h))
    deciles = np.linspace(0.1, 0.9, 9)

    def summary(boxes: list[tuple[float, ...]]) -> np.ndarray:
        left, top, w, h = np.array(boxes, float).T
        values = [left / width, top / height, w * h / (width * height), np.log(w / h)]
        return np.stack([np.quantile(value, deciles) for value in values])

    assert abs(summary(ours) - summary(theirs)).max() < 0.04


def test_other_scale_gives_other_areas() -> None:
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(200):
        left, top, right, bottom = random_resized_crop(rng, 400, 400, scale=(0.5, 0.6))
        areas.append((right - left) * (bottom - top) / 160_000)
    assert min(areas) > 0.49
    assert max(areas) < 0.61


def test_shape_follows_the_target() -> None:
    """Crops for a 1:2 target are stretched no more than those for a square one."""
    rng = np.random.default_rng(0)
    stretch = []
    for _ in range(500):
        left, top, right, bottom = random_resized_crop(rng, 1000, 800, aspect=2.0)
        stretch.append((right - left) / (bottom - top) / 2.0)
    assert 0.74 < min(stretch) < 0.80
    assert 1.25 < max(stretch) < 1.35
    assert abs(np.mean(np.log(stretch))) < 0.05


def test_fallback_is_central_and_of_an_allowed_shape() -> None:
    left, top, right, bottom = random_resized_crop(np.random.default_rng(0), 1000, 20)
    assert (top, bottom) == (0, 20)
    assert right - left == 27  # 20 * 4/3
    assert left == (1000 - 27) // 2


def test_center_crop() -> None:
    assert center_crop(400, 200, fraction=1.0) == (100, 0, 300, 200)
    left, top, right, bottom = center_crop(400, 200, aspect=4.0, fraction=0.5)
    assert math.isclose((right - left) / (bottom - top), 4.0)
    assert (left + right, top + bottom) == (400, 200)
    assert right - left == 200


def test_flip_probability() -> None:
    rng = np.random.default_rng(0)
    assert 430 < sum(flip_decision(rng, 0.5) for _ in range(1000)) < 570
    assert not any(flip_decision(rng, 0.0) for _ in range(100))
    assert all(flip_decision(rng, 1.0) for _ in range(100))
