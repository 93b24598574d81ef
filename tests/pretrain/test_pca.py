"""Principal components of patches: the fitting command compared with NumPy, its output file, and the PCA target."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data.index import load_index
from data.loader import Loader
from data.pack import pack
from data.sources import list_source
from pretrain import fit_pca
from pretrain.config import PretrainConfig, load
from pretrain.fit_pca import Covariance, fit
from pretrain.methods.targets.pca import PCAConfig, PCATarget, principal_components, read_components
from pretrain.models.patches import normalize_pixels, patchify
from pretrain.trainer.checkpoint import TrainState, check_continues

ROOT = Path(__file__).parents[2]
PATCH, VALUES = 4, 48
KEYS: dict[str, Any] = {"patch_size": PATCH, "images": 100, "image_size": 16, "seed": 3}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """42 images of smooth gradients with a little noise."""
    folder, out = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("packed")
    rng = np.random.default_rng(0)
    rows, cols = np.mgrid[0:24, 0:28]
    for number in range(42):
        slope = rng.uniform(-4, 4, (2, 3))
        pixels = (
            128 + (rows - 12)[..., None] * slope[0] + (cols - 14)[..., None] * slope[1] + rng.normal(0, 6, (24, 28, 3))
        )
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    pack(list_source(folder), out)
    return str(out)


@pytest.fixture
def components_file(shards: str, tmp_path: Path) -> Path:
    tensors, _ = fit(shards, components=6, num_workers=0, **KEYS)
    save_file(tensors, tmp_path / "pca.safetensors")
    return tmp_path / "pca.safetensors"


def cropped_patches(shards: str) -> np.ndarray:
    """The (n, P) float64 patches that `fit` reads: full batches of 32 from the first epoch's crops."""
    loader = Loader(load_index(shards), size=(16, 16), batch=32, seed=3)
    ((batch,),) = loader.batches(0, 1)
    return normalize_pixels(patchify(batch.images, PATCH)).flatten(0, 1).double().numpy()


def test_fitted_components_equal_numpy_svd(shards: str):
    tensors, held = fit(shards, components=VALUES, num_workers=0, **KEYS)
    patches = cropped_patches(shards)
    mean = patches.mean(0)
    _, singular, right = np.linalg.svd(patches - mean, full_matrices=False)
    variance = singular**2 / (len(patches) - 1)
    np.testing.assert_allclose(tensors["mean"], mean, atol=1e-6)
    np.testing.assert_allclose(tensors["variance"], variance, rtol=1e-5, atol=1e-7)
    components = tensors["components"].double().numpy()
    np.testing.assert_allclose(components @ components.T, np.eye(VALUES), atol=1e-6)
    for found, expected in zip(components[:8], right[:8], strict=True):  # distinct variances, so unique up to sign
        assert abs(found @ expected) == pytest.approx(1, abs=1e-5)
        assert found[np.abs(found).argmax()] > 0
    assert held == pytest.approx(1)


def test_incremental_covariance_equals_numpy():
    patches = torch.randn(500, 7, generator=torch.Generator().manual_seed(0)) @ torch.randn(7, 7) + 50
    covariance = Covariance(7)
    for part in patches.split(83):
        covariance.add(part)
    mean, matrix = covariance.result()
    np.testing.assert_allclose(mean, patches.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(matrix, np.cov(patches.double().numpy().T), rtol=1e-9)


def test_principal_components_are_the_top_eigenvectors():
    root = torch.randn(9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, vectors = np.linalg.eigh((root @ root.T).numpy())
    components, variances = principal_components(root @ root.T, 4)
    np.testing.assert_allclose(variances, values[::-1][:4])
    np.testing.assert_allclose(np.abs(components.numpy() @ vectors[:, ::-1][:, :4]), np.eye(4), atol=1e-9)


def test_more_components_reconstruct_better(shards: str, tmp_path: Path):
    ((batch,),) = Loader(load_index(shards), size=(16, 16), batch=8, seed=5).batches(0, 1)
    truth = patchify(batch.images, PATCH)
    errors = []
    for count in (1, 3, 9, 24, VALUES):
        tensors, _ = fit(shards, components=count, num_workers=0, **KEYS)
        save_file(tensors, tmp_path / f"{count}.safetensors")
        target = PCATarget(PCAConfig(file=str(tmp_path / f"{count}.safetensors")), PATCH)
        assert target.num_outputs == count
        true_coefficients = (normalize_pixels(truth) - target.mean) @ target.components.T
        assert target.loss(true_coefficients, truth) == 0
        rendered = target.render(true_coefficients, truth)["reconstruction"]
        errors.append((rendered.double() - truth.double()).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0
    assert errors[1] < 0.2 * errors[0]


def test_target_loss_is_fp32_under_autocast(components_file: Path):
    target = PCATarget(PCAConfig(file=str(components_file)), PATCH)
    truth = torch.randint(0, 256, (2, 5, VALUES), generator=torch.Generator().manual_seed(0)).byte()
    prediction = torch.zeros(2, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        autocast_loss = target.loss(prediction, truth)
    assert autocast_loss.dtype == torch.float32
    assert autocast_loss == target.loss(prediction, truth)


def test_command_writes_the_same_file_with_and_without_workers(shards: str, components_file: Path, tmp_path: Path):
    out = tmp_path / "made.safetensors"
    options = [
        f"--{name.replace('_', '-')}={value}" for name, value in {**KEYS, "components": 6, "num_workers": 2}.items()
    ]
    command = [sys.executable, "-m", "pretrain.fit_pca", shards, str(out), *options]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "6 of 48 components" in output
    assert f"target.name=pca target.file={out}" in output
    assert mae(out).target.sha256 in output
    assert sorted(tmp_path.iterdir()) == [out, components_file]
    assert out.read_bytes() == components_file.read_bytes()


def test_components_survive_a_power_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Both the bytes and the name are synced: a run refuses a file with other bytes."""
    synced, sync = [], os.fsync

    def record(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(fit_pca, "fit", lambda **options: ({"mean": torch.zeros(3)}, 1.0))
    assert fit_pca.main(["shards", str(tmp_path / "out" / "pca.safetensors")]) == 0
    assert synced[-2:] == ["unfinished-pca.safetensors", "out"]


def mae(file: Path, *overrides: str) -> PretrainConfig:
    keys = [
        "data.shards=/x",
        "data.image_size=16",
        f"model.patch_size={PATCH}",
        "target.name=pca",
        f"target.file={file}",
    ]
    return load("mae_vitb16_224_1600e", [*keys, *overrides])


def test_resume_accepts_a_moved_file_but_not_another(components_file: Path, tmp_path: Path):
    moved, other = tmp_path / "moved.safetensors", tmp_path / "other.safetensors"
    moved.write_bytes(components_file.read_bytes())
    save_file({name: tensor * 2 for name, tensor in load_file(components_file).items()}, other)
    first, same, different = (
        TrainState(resume_signature=mae(f).resume_signature()) for f in (components_file, moved, other)
    )
    check_continues(first, same)
    with pytest.raises(ValueError, match=r"target\.sha256 was"):
        check_continues(first, different)


def test_saved_config_pins_the_sha256_of_the_file(components_file: Path, tmp_path: Path):
    config = mae(components_file)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load(str(tmp_path / "config.yaml"), []) == config
    save_file({name: tensor * 2 for name, tensor in load_file(components_file).items()}, components_file)
    with pytest.raises(ValueError, match=r"not target\.sha256"):
        load(str(tmp_path / "config.yaml"), [])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["target.file=/nowhere"], r"target\.file='/nowhere' is not a file: make it with"),
        (["target.fille=x"], r"unknown key target\.fille: did you mean target\.file"),
        (["target.sha256=abc"], r"not target\.sha256=abc"),
        (["model.patch_size=8"], "patches of 48 values, but model.patch_size=8 has 192"),
        (["target.norm_pix=false"], r"unknown key target\.norm_pix"),
        (["target.file=null"], r"target\.file='null' is not a file"),
        (["target.name=tokens", "target.file=x"], r"unknown key target\.file"),
        (["target.tokenizer=random_projection"], r"unknown key target\.tokenizer"),
        (["method.encoder_mask_tokens=true", "method.decoder=conv"], r"set method\.decoder=transformer"),
    ],
)
def test_invalid_keys_are_rejected(overrides: list[str], message: str, components_file: Path):
    with pytest.raises(ValueError, match=message):
        mae(components_file, *overrides)


def test_files_without_components_are_rejected(tmp_path: Path):
    (tmp_path / "text").write_text("no components")
    save_file({"weights": torch.zeros(3)}, tmp_path / "weights")
    for name in ("text", "weights"):
        with pytest.raises(ValueError, match=r"holds no components .* make it with"):
            read_components(str(tmp_path / name), PATCH)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"image_size": 18}, "--image-size 18 is not a multiple of --patch-size 4"),
        ({"components": 49}, "--components 49: must be 1 to 48 for patches of 4x4 pixels"),
        ({"components": 0}, "--components 0"),
        ({"images": 0}, "--images 0 must be at least 1"),
        ({"images": 2}, "32 patches are too few for 48 components: pack more images, or raise --images"),
    ],
)
def test_invalid_options_are_rejected(keys: dict, message: str, shards: str):
    with pytest.raises(ValueError, match=message):
        fit(shards, **{"components": 6, "num_workers": 0, **KEYS, **keys})
