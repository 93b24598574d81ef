"""Tests of drawing the predictions of the tiny config."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.structures import SegDataSample
from PIL import Image

from downstream.segment import draw_segments as draw


@pytest.fixture(scope="module")
def weights(model: Any, cfg: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A config and weights as a training saves them."""
    folder = tmp_path_factory.mktemp("trained")
    torch.save({"state_dict": model.state_dict(), "meta": {"iter": 1}}, folder / "iter_1.pth")
    cfg.dump(folder / "config.py")
    return folder / "config.py", folder / "iter_1.pth"


def run_draw(*arguments: object) -> int:
    return draw.main([str(argument) for argument in arguments])


def test_segments_are_drawn(weights: tuple[Path, Path], model: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    photos, out = tmp_path / "photos", tmp_path / "out"
    (photos / "below").mkdir(parents=True)
    rng = np.random.default_rng(0)
    sizes = {"a.png": (64, 64), "below/b.png": (100, 70)}
    for name, size in sizes.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(photos / name)
    (photos / "broken.png").write_text("no image")
    assert run_draw(*weights, photos, out, "--opacity", 1) == 0
    output = capfd.readouterr()
    assert "2 drawings written to" in output.out
    assert "1 images cannot be decoded" in output.err
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == sorted(sizes)
    pixels = torch.tensor(np.array(Image.open(photos / "a.png"))[:, :, ::-1].copy()).permute(2, 0, 1)
    sample = SegDataSample(metainfo={"ori_shape": (64, 64), "img_shape": (64, 64)})
    with torch.no_grad():
        predicted = model.eval().test_step({"inputs": [pixels], "data_samples": [sample]})[0].pred_sem_seg.data[0]
    drawn = np.array(Image.open(out / "a.png")).reshape(64 * 64, 3)
    colors = [np.median(drawn[(predicted == label).flatten().numpy()], axis=0) for label in predicted.unique()]
    assert len(colors) > 1
    assert len({tuple(color) for color in colors}) == len(colors)  # a different color for each class
    for label, color in zip(predicted.unique(), colors, strict=True):
        assert (drawn[(predicted == label).flatten().numpy()] == color).all(
            1
        ).mean() > 0.7  # the rest is the class name


def test_draw_rejects_bad_arguments(
    weights: tuple[Path, Path], tmp_path: Path, ade: Path, capfd: pytest.CaptureFixture[str]
):
    config, trained = weights
    photos = ade / "images" / "validation"
    state = torch.load(trained, weights_only=True)
    state["state_dict"].popitem()
    torch.save(state, tmp_path / "other.pth")
    cases = {
        "does not match the configured model": (config, tmp_path / "other.pth", photos, tmp_path / "out"),
        "is not a checkpoint: give": (config, tmp_path / "gone.pth", photos, tmp_path / "out"),
        "did you mean upernet_vitb_lomar_160k": ("upernet_vitb_lomar", trained, photos, tmp_path / "out"),
        "is where the images are": (config, trained, photos, photos),
    }
    for message, arguments in cases.items():
        assert run_draw(*arguments) == 1, message
        error = capfd.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: "), error
        assert message in error
    with pytest.raises(SystemExit):
        run_draw(config, trained, photos, tmp_path / "out", "--opacity", 0)
