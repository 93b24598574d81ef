"""`python -m pretrain.reconstruct`: own images by a run that never ended, and what the picture says of itself."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.processes import SMALL
from PIL import Image
from torch import Tensor

from pretrain import reconstructions
from pretrain.build import build_method
from pretrain.config import PretrainConfig
from pretrain.reconstruct import main
from pretrain.trainer.checkpoint_layout import MANIFEST, MODEL_STATES, TrainState

MAE = {"name": "mae", "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
LOMAR = {"name": "lomar", "num_windows": 2, "window_size": 3}


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with SMALL:
        yield


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five photographs of different shapes in two class folders, and a file that is none."""
    rng = np.random.default_rng(0)
    for number in range(5):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (80 + number, 96, 3), dtype=np.uint8)).save(path)
    (tmp_path / "photos" / "a" / "0.jpg").write_bytes(b"no image")
    return tmp_path / "photos"


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run(section={...}) -> the folder of a run that was killed after its checkpoint of step 7."""

    def make(**sections: Any) -> Path:
        keys = {
            "name": "killed",
            "model": {"arch": "vit_tiny", "position": "sincos"},
            "data": {"shards": "/gone", "image_size": [64, 80]},
            **sections,
        }
        config = PretrainConfig.model_validate(keys)
        run = tmp_path / "runs" / "killed"
        checkpoint = run / "checkpoints" / "step_00000007"
        checkpoint.mkdir(parents=True)
        (run / "config.yaml").write_text(config.to_yaml())
        torch.save({"module": build_method(config).state_dict()}, checkpoint / MODEL_STATES)
        state = asdict(TrainState(step=7, resume_signature=config.resume_signature()))
        (checkpoint / MANIFEST).write_text(json.dumps({"state": state, "files": {}}))
        return run

    return make


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Tensor], str, str]]:
    """The columns, heading and caption of each picture; drawing takes long, and is only done in drawn.png."""
    calls: list[tuple[dict[str, Tensor], str, str]] = []
    draw = reconstructions.draw_image_grid

    def record(images: dict[str, Tensor], path: Path, heading: str, caption: str) -> None:
        calls.append((images, heading, caption))
        if path.name == "drawn.png":
            draw(images, path, heading, caption)

    monkeypatch.setattr(reconstructions, "draw_image_grid", record)
    return calls


def test_a_folder_of_images(make_run: Callable[..., Path], photos: Path, tmp_path: Path, drawn: Any, capsys: Any):
    run, out = make_run(method=LOMAR, target={"name": "pixels", "norm_pix": True}), tmp_path / "new" / "drawn.png"
    assert main([str(run), str(photos), str(out), "--count", "3"]) == 0
    said = capsys.readouterr()
    assert said.err == "left out, since it cannot be decoded: a/0\n"
    assert said.out == f"{out}: 3 images, killed: after 7 steps\n"
    assert Image.open(out).size[0] > 1000
    ((columns, heading, caption),) = drawn
    assert list(columns) == ["image", "what the model sees", "prediction alone", "both together*", "truth"]
    assert columns["truth"].shape == (3, 48, 48, 3)
    assert heading == "killed: after 7 steps"
    assert caption.startswith(
        "* The target is normalized patches (target.norm_pix): a patch's mean and contrast are not"
    )


def test_files_and_seeds(make_run: Callable[..., Path], photos: Path, tmp_path: Path, drawn: Any):
    run, files = make_run(method=MAE, target={"name": "pixels", "norm_pix": False}), sorted(photos.rglob("[1-4].jpg"))
    for seed in ("0", "0", "1"):
        assert main([str(run), *map(str, files), str(tmp_path / "out.png"), "--seed", seed]) == 0
    first, again, other = (columns for columns, *_ in drawn)
    assert list(first) == ["what the model sees", "prediction alone", "both together", "truth"]
    assert torch.equal(first["truth"], other["truth"])
    assert torch.equal(first["what the model sees"], again["what the model sees"])
    assert not torch.equal(first["what the model sees"], other["what the model sees"])
    assert drawn[0][2] == ""


@pytest.mark.parametrize(
    "sections",
    [
        {"method": LOMAR, "lut": {"hidden_dim": 16}, "model": {"arch": "vit_tiny"}},
        {"method": MAE | {"name": "lc_mae"}},
        {"method": MAE | {"name": "ae", "block_size": 24}},
        {"method": {"name": "simmim", "mask_patch_size": 16}},
    ],
    ids=["lut", "lc_mae", "ae", "simmim"],
)
def test_methods_with_more_than_a_mask(
    sections: dict[str, Any], make_run: Callable[..., Path], photos: Path, drawn: Any
):
    run = make_run(**sections)
    assert main([str(run), str(photos / "b" / "1.jpg"), str(run / "out.png")]) == 0
    ((columns, *_),) = drawn
    assert list(columns)[-1] == "truth"
    assert all(column.dtype == torch.uint8 for column in columns.values())


def test_what_cannot_be_drawn_is_refused(make_run: Callable[..., Path], photos: Path, tmp_path: Path, capsys: Any):
    def refused(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 1
        return capsys.readouterr().err

    run, out = make_run(method={"name": "beit"}, target={"name": "tokens", "vocab_size": 32}), tmp_path / "out.png"
    assert "predicts target.name=tokens, which have no pixels" in refused(run, photos, out)
    assert "is not the folder of a run: it has no config.yaml" in refused(photos, photos, out)
    assert "named *.png" in refused(run, photos / "b" / "1.jpg", photos / "b" / "3.jpg")
    assert "--count 0 must be at least 1" in refused(run, photos, out, "--count", "0")
    assert "is no image (jpg, " in refused(run, photos, photos, out)
    (run / "checkpoints" / "step_00000007" / MANIFEST).unlink()
    (run / "checkpoints" / "step_00000007" / MODEL_STATES).unlink()
    (run / "checkpoints" / "step_00000007").rmdir()
    assert "has no checkpoint, and an encoder's file alone does not have what predicts pixels" in refused(
        run, photos, out
    )
    assert not out.exists()


def test_none_of_the_images_can_be_decoded(make_run: Callable[..., Path], photos: Path, tmp_path: Path, capsys: Any):
    assert main([str(make_run(method=MAE)), str(photos / "a" / "0.jpg"), str(tmp_path / "out.png")]) == 1
    assert capsys.readouterr().err.endswith("error: none of the images can be decoded\n")
