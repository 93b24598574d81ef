import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import ColorJitter, RandomCrop, RandomResizedCrop
from torchvision.transforms import functional as tv

from data.augment import color_jitter, three_augment
from data.decode import decode
from data.transforms import Augmentation, center_crop, flip_decision, random_resized_crop, simple_crop

SHAPES = [(500, 375), (64, 300), (300, 40), (9, 9)]


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_crops_lie_inside_and_respect_the_limits(width: int, height: int) -> None:
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
    """Compares deciles of position, area and aspect ratio over 3000 draws each."""
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


def test_scale_limits_the_area() -> None:
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(200):
        left, top, right, bottom = random_resized_crop(rng, 400, 400, scale=(0.5, 0.6))
        areas.append((right - left) * (bottom - top) / 160_000)
    assert min(areas) > 0.49
    assert max(areas) < 0.61


def test_crops_have_roughly_the_aspect_ratio_of_the_target() -> None:
    """Crops for a 2:1 target are stretched no more than those for a square one."""
    rng = np.random.default_rng(0)
    stretch = []
    for _ in range(500):
        left, top, right, bottom = random_resized_crop(rng, 1000, 800, aspect=2.0)
        stretch.append((right - left) / (bottom - top) / 2.0)
    assert 0.74 < min(stretch) < 0.80
    assert 1.25 < max(stretch) < 1.35
    assert abs(np.mean(np.log(stretch))) < 0.05


def test_fallback_is_centered_with_an_allowed_aspect_ratio() -> None:
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


@pytest.mark.parametrize(("width", "height"), [(60, 40), (40, 60), (40, 40), (300, 50)])
def test_simple_crop_equals_resize_pad_and_crop(width: int, height: int) -> None:
    """Compared with torchvision's Resize of the short side, reflection padding by 4, and a crop at the same place."""
    size = (32, 32)
    pixels = np.random.default_rng(1).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "PNG")
    resized = tv.resize(image, min(size), tv.InterpolationMode.BICUBIC)
    padded = np.pad(np.asarray(resized), ((4, 4), (4, 4), (0, 0)), mode="reflect").astype(int)
    corners = set()
    for seed in range(40):
        box = simple_crop(np.random.default_rng(seed), width, height, size)
        scale = min(width, height) / 32
        left, top = round(box[0] / scale) + 4, round(box[1] / scale) + 4
        corners.add((left, top))
        ours = decode(file.getvalue(), lambda w, h, box=box: box, size).astype(int)
        theirs = padded[top : top + 32, left : left + 32]
        assert abs(ours - theirs).mean() < 1, box
    rows, cols = padded.shape[0] - 32 + 1, padded.shape[1] - 32 + 1
    assert {corner[0] for corner in corners} <= set(range(cols))
    assert {corner[1] for corner in corners} <= set(range(rows))
    assert len(corners) > 20


def test_simple_crops_are_uniform() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    ours = [simple_crop(rng, 96, 64, (32, 32))[:2] for _ in range(4000)]
    image = torch.empty(3, 32 + 8, 48 + 8)
    theirs = [RandomCrop.get_params(image, (32, 32))[1::-1] for _ in range(4000)]
    for side in (0, 1):
        mine = np.bincount([round(corner[side] / 2) + 4 for corner in ours], minlength=25) / 4000
        reference = np.bincount([corner[side] for corner in theirs], minlength=25) / 4000
        assert abs(mine - reference).max() < 0.03


def test_color_jitter_has_torchvisions_distribution() -> None:
    torch.manual_seed(0)
    pixels = np.random.default_rng(0).integers(40, 200, (8, 8, 3), dtype=np.uint8)
    rng, jitter = np.random.default_rng(0), ColorJitter(0.4, 0.4, 0.2, 0.1)
    ours = np.stack([color_jitter(rng, pixels, 1.0) for _ in range(2000)]).mean((1, 2))
    theirs = np.stack([np.asarray(jitter(Image.fromarray(pixels))) for _ in range(2000)]).mean((1, 2))
    deciles = np.linspace(0.1, 0.9, 9)
    assert abs(np.quantile(ours, deciles, axis=0) - np.quantile(theirs, deciles, axis=0)).max() < 5
    unchanged = sum(np.array_equal(color_jitter(rng, pixels, 0.8), pixels) for _ in range(1000))
    assert 150 < unchanged < 250


def test_three_augment_applies_each_augmentation_equally_often() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    rough = abs(np.diff(pixels.astype(int), axis=0)).mean()
    gray = solarized = blurred = 0
    for seed in range(600):
        changed = three_augment(np.random.default_rng(seed), pixels).astype(int)
        if (changed == changed[..., :1]).all():
            gray += 1
        elif np.array_equal(changed, np.where(pixels < 128, pixels, 255 - pixels)):
            solarized += 1
        else:
            blurred += abs(np.diff(changed, axis=0)).mean() < rough
    assert gray + solarized + blurred == 600
    assert all(150 < count < 250 for count in (gray, solarized, blurred))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": (0.5, 0.2)}, "crop_scale"),
        ({"scale": (0.0, 1.0)}, "crop_scale"),
        ({"flip": 1.5}, "flip"),
        ({"color_jitter": -1.0}, "color_jitter"),
    ],
)
def test_invalid_augmentations_are_rejected(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)
