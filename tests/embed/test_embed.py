"""`downstream.embed` on one rank: features in the order of the data. tests/classify has a test on two ranks."""

import csv
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.labeled_images import run_in_process, write_classes, write_photo
from helpers.tiny import TINY
from helpers.tiny_classifier import configure
from safetensors.torch import save_file

from data.eval_loader import EvalLoader
from data.image_folder import load_samples
from data.pack import pack
from data.sources import list_source
from downstream import embed
from downstream.checkpoints.weights import features
from downstream.classify.finish import save_classifier
from downstream.classify.model import build_classifier
from pretrain.models import vit
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.patches import normalize_pixels
from pretrain.models.vit import ViT

NAMES = ["ant", "bee"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(vit.ARCHS, "vit_tiny", TINY)


@pytest.fixture
def encoder() -> ViT:
    torch.manual_seed(0)
    model = ViT("vit_tiny", 16, (2, 2), relative=False).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def file(encoder: ViT, tmp_path: Path) -> Path:
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors", EncoderSpec.of(encoder).to_metadata())
    return tmp_path / "encoder.safetensors"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eleven images in two class folders; one image cannot be decoded."""
    write_classes(tmp_path / "photos", NAMES, 5, bad=1)
    write_photo(tmp_path / "photos" / "bee" / "more" / "deep.jpg", 77)
    return tmp_path / "photos"


def tokens(encoder: ViT, data: Path, block: int | None = None) -> np.ndarray:
    """Reference tokens, image by image and block by block; NaN for images that cannot be decoded."""
    found = []
    for batch in EvalLoader(load_samples(data), size=(32, 32), batch=1).batches():
        pixels = normalize_pixels(batch.images).permute(0, 3, 1, 2)
        with torch.no_grad():
            patches = (
                encoder.patch_embed.proj.weight.flatten(1)
                @ pixels.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).reshape(4, -1).T
            )
            x = patches.T + encoder.patch_embed.proj.bias + encoder.pos_embed[0, 1:]
            x = torch.cat([encoder.cls_token[0], x])[None]
            for layer in encoder.blocks[:block]:
                x = layer(x, None)
            x = x if block else encoder.norm(x)
        found.append(x[0].numpy() if batch.readable[0] else np.full(x.shape[1:], np.nan))
    return np.stack(found)


@pytest.mark.parametrize(
    ("kind", "block"),
    [("mean", None), ("class", None), ("patches", None), ("class_mean", None), ("class", "1"), ("patches", "1,2")],
)
def test_rows_equal_the_encoder_features(kind: str, block: Any, encoder: ViT, file: Path, photos: Path, tmp_path: Path):
    options = ["--block", block] if block else []
    out = tmp_path / "new" / "out.npy"
    result = run_in_process(embed, file, photos, out, "--features", kind, *options)
    written = np.load(out)
    blocks = [int(number) for number in block.split(",")] if block else [None]
    expected = np.concatenate([tokens(encoder, photos, number) for number in blocks], axis=-1)
    first, mean = expected[:, 0], expected[:, 1:].mean(1)
    both = np.concatenate([first, mean], axis=-1)
    expected = {"class": first, "mean": mean, "patches": expected[:, 1:], "class_mean": both}[kind]
    np.testing.assert_allclose(written, expected, rtol=1e-4, atol=1e-5)
    assert written.dtype == np.float32
    assert np.isnan(written).all(axis=tuple(range(1, written.ndim))).sum() == 1
    assert result == {
        "images": 11,
        "skipped": 1,
        "shape": list(expected.shape),
        "out": str(tmp_path / "new" / "out.npy"),
    }
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out.csv", "out.npy"]


def test_csv_describes_every_row(file: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_in_process(embed, file, photos, tmp_path / "out.npy", "--dtype", "float16")
    assert "1 of 11 images cannot be decoded and have rows of NaN: ant/000" in capsys.readouterr().err
    assert np.load(tmp_path / "out.npy").dtype == np.float16
    with (tmp_path / "out.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["key"] for row in rows] == sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.jpg"))
    assert [row["class"] for row in rows] == ["ant"] * 5 + ["bee"] * 6
    assert [row["label"] for row in rows] == ["0"] * 5 + ["1"] * 6
    assert [row["readable"] for row in rows] == ["0"] + ["1"] * 10


def test_shards_give_the_same_features_as_the_image_folder(file: Path, photos: Path, tmp_path: Path):
    pack(list_source(photos), tmp_path / "shards", samples_per_shard=4, bad="skip")
    run_in_process(embed, file, tmp_path / "shards", tmp_path / "shards.npy")
    run_in_process(embed, file, photos, tmp_path / "photos.npy")
    assert np.load(tmp_path / "shards.npy") == pytest.approx(np.load(tmp_path / "photos.npy")[1:], rel=1e-5, abs=1e-6)


def test_size_option_changes_the_number_of_patches(file: Path, photos: Path, tmp_path: Path):
    result = run_in_process(embed, file, photos, tmp_path / "out.npy", "--size", 48, "--features", "patches")
    assert result["shape"] == [11, 9, TINY.dim]


def test_parquet_output_has_the_same_rows(file: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(embed, "CHUNK_BYTES", 1000)  # several row groups
    for kind in ("mean", "patches"):
        run_in_process(embed, file, photos, tmp_path / "out.npy", "--features", kind)
        run_in_process(embed, file, photos, tmp_path / "out.parquet", "--features", kind)
        table = parquet.read_table(tmp_path / "out.parquet")
        np.testing.assert_array_equal(np.array(table["features"].to_pylist()), np.load(tmp_path / "out.npy"))
        with (tmp_path / "out.csv").open(newline="") as rows:
            keys = [row["key"] for row in csv.DictReader(rows)]
        assert table["key"].to_pylist() == keys
        assert table["label"].to_pylist() == [0] * 5 + [1] * 6
        assert table["class"].to_pylist() == ["ant"] * 5 + ["bee"] * 6
        assert table["readable"].to_pylist() == [False] + [True] * 10


def test_features_of_a_classifier_are_the_input_of_its_head(photos: Path, tmp_path: Path):
    config = configure(tmp_path, data__image_size=32, model__patch_size=16)
    classifier, _ = build_classifier(config)
    for parameter in classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_classifier(classifier.state_dict(), config, (), tmp_path / "model.safetensors")
    run_in_process(embed, tmp_path / "model.safetensors", photos, tmp_path / "out.npy")
    head = classifier.vit.head
    logits = np.load(tmp_path / "out.npy")[1:] @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    (batch,) = EvalLoader(load_samples(photos), size=(32, 32), batch=11).batches()
    with torch.no_grad():
        expected = classifier.eval()(batch.images)["logits"][1:]
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)


def test_invalid_options_are_rejected_early(file: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"block 3: the encoder has blocks 1 to 2"):
        run_in_process(embed, file, photos, tmp_path / "out.npy", "--block", 3)
    with pytest.raises(ValueError, match=r"blocks 2,1: give each of them once, in ascending order: 1,2"):
        run_in_process(embed, file, photos, tmp_path / "out.npy", "--block", "2,1")
    with pytest.raises(ValueError, match=r"out\.csv: give a name that ends in \.npy or \.parquet"):
        run_in_process(embed, file, photos, tmp_path / "out.csv")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "pyarrow", None)
        patched.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(ValueError, match=re.escape("pip install 'lomar-deepspeed[parquet]'")):
            run_in_process(embed, file, photos, tmp_path / "out.parquet")
    with monkeypatch.context() as patched:
        patched.setattr(embed.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
        with pytest.raises(ValueError, match=r"0\.0 GB free: use another disk, --dtype float16, or --features"):
            run_in_process(embed, file, photos, tmp_path / "out.npy")
    assert not list(tmp_path.glob("out*"))


def test_only_relative_positions_allow_other_image_sizes(encoder: ViT):
    """Relative positions work on any grid; with absolute ones the error suggests `image_size`."""
    relative = ViT("vit_tiny", 16, (2, 2)).eval()
    larger = ViT("vit_tiny", 16, (3, 4)).eval()
    larger.load_state_dict(relative.state_dict())
    images = torch.randn(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(features(relative, images), features(larger, images), rtol=0, atol=0)
    with pytest.raises(
        ValueError,
        match=r"images of 48x64 pixels, but the encoder's positions are for 32x32: .* image_size=\(48, 64\)",
    ):
        features(encoder, images)
    for model in (relative, encoder):
        with pytest.raises(ValueError, match="images of 48x60 pixels cannot be cut into patches of 16"):
            features(model, images[..., :60])
