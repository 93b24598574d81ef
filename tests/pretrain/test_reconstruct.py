"""`python -m pretrain.reconstruct`: reconstructions of given images by an unfinished run, with heading and caption."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from helpers.processes import SMALL
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from pretrain import reconstructions
from pretrain.build import build_method, feature_teacher, untrained_teacher
from pretrain.config import PretrainConfig
from pretrain.methods import METHODS
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.vit import ViT
from pretrain.reconstruct import load_trained, main
from pretrain.trainer.checkpoint_layout import EMA_FILE, MANIFEST, MODEL_STATES, TrainState

MAE = {"name": "mae", "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
LOMAR = {"name": "lomar", "num_windows": 2, "window_size": 3}


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with SMALL:
        yield


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images of different shapes in two class folders: four photographs and a corrupt file."""
    rng = np.random.default_rng(0)
    for number in range(5):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (80 + number, 96, 3), dtype=np.uint8)).save(path)
    (tmp_path / "photos" / "a" / "0.jpg").write_bytes(b"no image")
    return tmp_path / "photos"


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run(section={...}) -> the folder of a run that was killed after its checkpoint at step 7."""

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
        method = build_method(config, untrained_teacher(config))
        torch.save({"module": method.state_dict()}, checkpoint / MODEL_STATES)
        if config.target.name == "ema":
            averages = feature_teacher(method).state_dict()
            save_file({name: tensor + 1 for name, tensor in averages.items()}, checkpoint / EMA_FILE)
        state = asdict(TrainState(step=7, resume_signature=config.resume_signature()))
        (checkpoint / MANIFEST).write_text(json.dumps({"state": state, "files": {}}))
        return run

    return make


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Tensor], str, str]]:
    """The columns, heading and caption of each picture. Only drawn.png is really drawn, since drawing is slow."""
    calls: list[tuple[dict[str, Tensor], str, str]] = []
    draw = reconstructions.draw_image_grid

    def record(images: dict[str, Tensor], path: Path, heading: str, caption: str) -> None:
        calls.append((images, heading, caption))
        if path.name == "drawn.png":
            draw(images, path, heading, caption)

    monkeypatch.setattr(reconstructions, "draw_image_grid", record)
    return calls


def test_folder_of_images(make_run: Callable[..., Path], photos: Path, tmp_path: Path, drawn: Any, capsys: Any):
    run, out = make_run(method=LOMAR, target={"name": "pixels", "norm_pix": True}), tmp_path / "new" / "drawn.png"
    assert main([str(run), str(photos), str(out), "--count", "3"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "skipped, cannot be decoded: a/0\n"
    assert printed.out == f"{out}: 3 images, killed: after 7 steps\n"
    assert Image.open(out).size[0] > 1000
    ((columns, heading, caption),) = drawn
    assert list(columns) == ["image", "what the model sees", "prediction alone", "both together*", "truth"]
    assert columns["truth"].shape == (3, 48, 48, 3)
    assert heading == "killed: after 7 steps"
    assert caption.startswith(
        "* The target is normalized patches (target.norm_pix): a patch's mean and contrast are not"
    )


def test_masks_depend_on_the_seed(make_run: Callable[..., Path], photos: Path, tmp_path: Path, drawn: Any):
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
def test_other_methods_and_lut_are_reconstructed(
    sections: dict[str, Any], make_run: Callable[..., Path], photos: Path, drawn: Any
):
    run = make_run(**sections)
    assert main([str(run), str(photos / "b" / "1.jpg"), str(run / "out.png")]) == 0
    ((columns, *_),) = drawn
    assert list(columns)[-1] == "truth"
    assert all(column.dtype == torch.uint8 for column in columns.values())


@pytest.mark.parametrize(
    ("sections", "titles"),
    [
        ({"method": {"name": "beit"}, "target": {"name": "tokens", "vocab_size": 32}}, ["codes*", "predicted codes"]),
        ({"method": MAE, "target": {"name": "teacher"}}, ["features*", "predicted features"]),
        ({"method": {**MAE, "name": "tec", "num_queries": 2}}, ["features*", "predicted features"]),
        ({"method": MAE, "target": {"name": "ema", "blocks": 2}}, ["features*", "predicted features"]),
        ({"method": LOMAR, "target": {"name": "ema", "blocks": 1}}, ["features*", "predicted features"]),
    ],
    ids=["tokens", "teacher", "tec", "mae-ema", "lomar-ema"],
)
def test_targets_without_pixels_are_drawn_in_false_colors(
    sections: dict[str, Any],
    titles: list[str],
    make_run: Callable[..., Path],
    photos: Path,
    tmp_path: Path,
    drawn: Any,
    capsys: Any,
):
    """A frozen teacher is read from its file, which may have moved since if `--set` gives the new path."""
    torch.manual_seed(3)
    encoder, file = ViT("vit_tiny", 16, (4, 5), relative=False), tmp_path / "teacher.safetensors"
    metadata = EncoderSpec("vit_tiny", 16, (64, 80), "sincos").to_metadata()
    save_file(encoder.state_dict(), file, metadata=metadata)
    frozen = sections.get("target", {"name": "teacher"})["name"] == "teacher"
    if frozen:
        sections = sections | {"target": {"name": "teacher", "blocks": 1, "file": str(file)}}
    run = make_run(**sections)
    command = [str(run), str(photos / "b" / "1.jpg"), str(run / "out.png")]
    assert main(command) == 0
    ((columns, _, caption),) = drawn
    assert [title for title in columns if "code" in title or "feature" in title] == titles
    assert "have no pixels" in caption
    if frozen:
        file.rename(tmp_path / "moved.safetensors")
        assert main(command) == 1
        assert "is not a file: give one with the teacher's weights" in capsys.readouterr().err
        assert main([*command, "--set", f"target.file={tmp_path / 'moved.safetensors'}"]) == 0
        assert torch.equal(drawn[1][0][titles[0]], columns[titles[0]])


def test_ema_teacher_is_loaded_from_the_checkpoint(make_run: Callable[..., Path]):
    run = make_run(method=MAE, target={"name": "ema", "blocks": 2})
    method, *_ = load_trained(run, [])
    teacher = method.target.teacher.state_dict()
    assert teacher.keys() == method.state_dict().keys() & teacher.keys()
    assert all(torch.equal(tensor, method.state_dict()[name] + 1) for name, tensor in teacher.items())


def test_custom_method_needs_method_module_on_the_command_line(
    make_run: Callable[..., Path], photos: Path, tmp_path: Path, drawn: Any, capsys: Any
):
    module = tmp_path / "mine.py"
    module.write_text(
        "from typing import Literal\nfrom pretrain.methods.mae import MAE\n\n\nclass Mine(MAE):\n"
        '    class Config(MAE.Config):\n        name: Literal["mine"] = "mine"\n'
    )
    run = make_run(method=MAE)
    keys = yaml.safe_load((run / "config.yaml").read_text())
    keys["method"] |= {"name": "mine", "module": str(module)}
    (run / "config.yaml").write_text(yaml.safe_dump(keys))
    command = [str(run), str(photos / "b" / "1.jpg"), str(run / "out.png")]
    assert main(command) == 1
    assert f"give method.module={module} on the command line" in capsys.readouterr().err
    with patch.dict(METHODS), patch.dict(sys.modules), patch.object(sys, "path", [*sys.path]):
        assert main([*command, "--set", f"method.module={module}"]) == 0
    assert len(drawn) == 1


def test_invalid_input_is_rejected(make_run: Callable[..., Path], photos: Path, tmp_path: Path, capsys: Any):
    def error_of(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 1
        return capsys.readouterr().err

    run, out = make_run(method={"name": "beit"}, target={"name": "tokens", "vocab_size": 32}), tmp_path / "out.png"
    assert "is not the folder of a run: it has no config.yaml" in error_of(photos, photos, out)
    assert "named *.png" in error_of(run, photos / "b" / "1.jpg", photos / "b" / "3.jpg")
    assert "--count 0 must be at least 1" in error_of(run, photos, out, "--count", "0")
    assert "is not an image (jpg, " in error_of(run, photos, photos, out)
    (run / "checkpoints" / "step_00000007" / MANIFEST).unlink()
    (run / "checkpoints" / "step_00000007" / MODEL_STATES).unlink()
    (run / "checkpoints" / "step_00000007").rmdir()
    assert "has no checkpoint, and an encoder file alone lacks the part that predicts pixels" in error_of(
        run, photos, out
    )
    assert not out.exists()


def test_fails_if_no_image_can_be_decoded(make_run: Callable[..., Path], photos: Path, tmp_path: Path, capsys: Any):
    assert main([str(make_run(method=MAE)), str(photos / "a" / "0.jpg"), str(tmp_path / "out.png")]) == 1
    assert capsys.readouterr().err.endswith("error: none of the images can be decoded\n")
