"""Tests of reading encoders of our own runs: a real ZeRO-3 run of two processes, and all other kinds of files."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from helpers.ports import free_port
from helpers.waiting import SECONDS
from PIL import Image
from safetensors.torch import load_file, save_file

from downstream.checkpoints.export import export_encoder
from downstream.checkpoints.weights import load_encoder, load_into, read_encoder
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.vit import ARCHS, Arch, ViT
from pretrain.trainer.checkpoint_layout import (
    EMA_FILE,
    LATEST,
    MANIFEST,
    MODEL_STATES,
    STAGE3_MODEL_STATES,
    TrainState,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _real_vit_tiny():
    """The run trains a real ViT-Ti."""
    with patch.dict(ARCHS, vit_tiny=Arch(192, 12, 3)):
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "photos").mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{number}.jpg")
    pack = [sys.executable, "-m", "data.pack", str(folder / "photos"), str(folder / "shards")]
    subprocess.run(pack, cwd=ROOT, check=True, capture_output=True)
    recipe = {
        "name": "secret-name",
        "runs": str(folder / "runs"),
        "method": {"name": "lomar", "num_windows": 2, "window_size": 3},
        "model": {"arch": "vit_tiny"},
        "data": {"shards": str(folder / "shards"), "image_size": [64, 80], "num_workers": 0},
        "optim": {"warmup_epochs": 0.1, "base_lr": 1e-2},
        "train": {"epochs": 1, "global_batch_size": 4, "precision": "fp32", "ds_config": "zero3"},
        "log": {"every_steps": 1, "num_reconstructions": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    port = str(free_port())
    ranks = []
    for rank in ("0", "1"):
        launcher = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        command = [sys.executable, str(ROOT / "pretrain" / "run.py"), str(folder / "recipe.yaml")]
        environment = {**os.environ, **launcher}
        ranks.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    outputs = [process.communicate(timeout=SECONDS)[0] for process in ranks]
    assert all(process.returncode == 0 for process in ranks), outputs
    return folder / "runs" / "secret-name"


def assert_same_bits(encoder: ViT, run: Path) -> None:
    expected = load_file(run / "encoder.safetensors")
    assert expected.keys() == encoder.state_dict().keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in encoder.state_dict().items())


@pytest.mark.engine
def test_zero3_checkpoint_is_bitwise_identical_to_the_saved_encoder(run: Path):
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    assert not (checkpoint / MODEL_STATES).exists()
    for path in (run, checkpoint, checkpoint / STAGE3_MODEL_STATES):
        encoder, report = load_encoder(path)
        assert_same_bits(encoder, run)
        assert encoder.grid == (4, 5)
        assert read_encoder(path).spec == EncoderSpec("vit_tiny", 16, (64, 80), "relative", "lomar", epochs=1)
        assert not report.folded
        assert not report.resized
    assert set(report.dropped.values()) == {"the pretraining predictor"}
    larger = ViT("vit_tiny", 16, (7, 7))
    load_into(larger, checkpoint)
    assert_same_bits(larger, run)


@pytest.mark.engine
def test_checkpoint_that_lacks_a_rank_is_rejected(run: Path, tmp_path: Path):
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    for path in checkpoint.iterdir():
        if "rank_1" not in path.name:
            (tmp_path / path.name).hardlink_to(path)
    with pytest.raises(ValueError, match="has only 1 of 2 ranks' files"):
        load_encoder(tmp_path)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"no readable manifest\.json"):
        load_encoder(tmp_path)


@pytest.mark.engine
def test_model_card_has_the_records_of_the_run_but_no_private_names(run: Path, tmp_path: Path):
    export_encoder(run, tmp_path / "hf", "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    environment = json.loads((run / "environment.json").read_text())
    for text in (
        "library_name: timm",
        "vit_tiny_patch16, 64x80 pixels, lomar",
        "2 steps, 1 of 1 epochs, 8 samples of a data set of 8 images",
        f"last logged loss: {last['loss']:.4g}\n",
        "2 processes on",
        "ZeRO stage 3",
        environment["git"],
        f"torch {torch.__version__.split('+')[0]}",
        "num_windows: 2",
        "name: pixels",
    ):
        assert text in card, text
    for private in (str(run.parent), "shards", "secret-name"):
        assert private not in card, private


def _stage1(folder: Path, encoder: ViT, prefix: str) -> Path:
    """Write a checkpoint as DeepSpeed does with ZeRO 0 to 2, where one file has the whole module."""
    state = {f"{prefix}{name}": tensor for name, tensor in encoder.state_dict().items()}
    checkpoint = folder / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    torch.save({"module": {**state, "fill.novel": torch.ones(3)}}, checkpoint / MODEL_STATES)
    signature = {"model": {"arch": "vit_tiny", "patch_size": 16, "position": "sincos"}, "data": {"image_size": 48}}
    state = TrainState(resume_signature={**signature, "method": {"name": "mae"}})
    (checkpoint / MANIFEST).write_text(json.dumps({"state": asdict(state)}))
    (folder / "checkpoints" / LATEST).write_text(checkpoint.name)
    (folder / "config.yaml").write_text("train: {epochs: 3}")
    return checkpoint


@pytest.mark.parametrize("prefix", ["encoder.", "method.encoder."])
def test_run_without_an_export_is_read_from_its_newest_checkpoint(prefix: str, tmp_path: Path):
    original = ViT("vit_tiny", 16, (3, 3), relative=False)
    checkpoint = _stage1(tmp_path, original, prefix)
    for path in (tmp_path, checkpoint, checkpoint / MODEL_STATES):
        encoder, report = load_encoder(path)
        assert all(torch.equal(tensor, original.state_dict()[name]) for name, tensor in encoder.state_dict().items())
        assert read_encoder(path).spec == EncoderSpec("vit_tiny", 16, (48, 48), "sincos", "mae", epochs=3)
        assert report.dropped == {"fill.novel": "the method's own"}


def test_online_and_averaged_encoders_of_a_run_are_read(tmp_path: Path):
    encoders = {kind: ViT("vit_tiny", 16, (2, 3)) for kind in ("online", "ema")}
    metadata = EncoderSpec("vit_tiny", 16, (32, 48), "relative", "lomar", epochs=1).to_metadata()
    save_file(encoders["online"].state_dict(), tmp_path / "encoder.safetensors", metadata=metadata)
    (tmp_path / "config.yaml").write_text("train: {epochs: 1}")
    with pytest.raises(ValueError, match=r"has no encoder_ema\.safetensors and no checkpoint yet"):
        load_encoder(tmp_path, weights="ema")
    save_file(encoders["ema"].state_dict(), tmp_path / "encoder_ema.safetensors", metadata=metadata)
    for weights, path in ((None, tmp_path), ("ema", tmp_path), ("ema", tmp_path / "encoder_ema.safetensors")):
        encoder, report = load_encoder(path, weights=weights)  # type: ignore[arg-type]
        assert report.weights == (weights or "online")
        assert torch.equal(encoder.cls_token, encoders[weights or "online"].cls_token)
        assert encoder.grid == (2, 3)
    with pytest.raises(ValueError, match="holds the ema weights, not the online ones"):
        load_encoder(tmp_path / "encoder_ema.safetensors", weights="online")


def test_moving_average_of_a_checkpoint_is_read(tmp_path: Path):
    online, averaged = (ViT("vit_tiny", 16, (3, 3), relative=False) for _ in range(2))
    checkpoint = _stage1(tmp_path, online, "method.encoder.")
    for path in (checkpoint, tmp_path):
        with pytest.raises(ValueError, match="this training kept none"):
            load_encoder(path, weights="ema")
    state = {f"encoder.{name}": tensor for name, tensor in averaged.state_dict().items()}
    save_file({**state, "projector.0.weight": torch.ones(2)}, checkpoint / EMA_FILE)
    for path in (checkpoint, tmp_path):
        encoder, report = load_encoder(path, weights="ema")
        assert torch.equal(encoder.cls_token, averaged.cls_token)
        assert "(ema weights)" in str(report)
        assert report.dropped == {"projector.0.weight": "the method's own"}
        assert torch.equal(load_encoder(path)[0].cls_token, online.cls_token)


def test_empty_run_is_rejected(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("train: {epochs: 1}")
    with pytest.raises(ValueError, match=r"no encoder\.safetensors and no checkpoint yet"):
        load_encoder(tmp_path)
