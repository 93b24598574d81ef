"""Tests of encoder probes: k-NN and ridge regression against sklearn; tests/pretrain covers the trained probes."""

import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.labeled_images import run_in_process, write_classes
from safetensors.torch import save_file
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier

from data.eval_loader import EvalLoader
from data.image_folder import load_samples
from downstream.checkpoints.weights import features
from downstream.classify import probe as command
from pretrain.config import load
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.patches import normalize_pixels
from pretrain.models.vit import ARCHS, ViT
from pretrain.probe.in_training import Probe
from pretrain.probe.measure import check_sets, describe, names_of, probe, trusted
from pretrain.probe.neighbors import METRICS, RIDGE, ridge, votes
from pretrain.probe.settings import ProbeSettings
from pretrain.trainer.launch import World

CPU = torch.device("cpu")
NAMES = ["a", "b", "c", "d", "e", "f"]
FEW = {"attentive_steps": 3, "finetune_epochs": 1}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training images, 3 of them undecodable, and 18 validation images, 1 of them undecodable."""
    root = tmp_path_factory.mktemp("photos")
    write_classes(root / "train", NAMES, 8, bad=3)
    write_classes(root / "val", NAMES, 3, bad=1, first=100)
    return root


@pytest.fixture
def encoder() -> ViT:
    torch.manual_seed(1)
    model = ViT("vit_tiny", 16, (2, 2), relative=False).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def sets(photos: Path, **settings: Any) -> list[EvalLoader]:
    return [
        EvalLoader(load_samples(photos / n), **{"size": (32, 32), "batch": 7, **settings}) for n in ("train", "val")
    ]


def plain_features(encoder: ViT, loader: EvalLoader, pool: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Compute normalized features and labels of the readable images one by one, and count all images."""
    found, labels = [], []
    for batch in EvalLoader(loader.samples, size=(32, 32), batch=1).batches():
        if batch.readable[0]:
            with torch.no_grad():
                tokens = features(encoder, normalize_pixels(batch.images).permute(0, 3, 1, 2))[0]
            vector = (tokens[0] if pool == "class" else tokens[1:].mean(0)).double().numpy()
            found.append(vector / np.linalg.norm(vector))
            labels.append(int(batch.labels[0]))
    return np.array(found), np.array(labels), len(loader.samples)


def measure(encoder: ViT, train: EvalLoader, val: EvalLoader, **settings: Any) -> dict[str, Any]:
    """Probe the encoder, by default without the trained probes."""
    return probe(encoder, train, val, ProbeSettings(**{"k": 20, "attentive_steps": 0, **settings}), device=CPU)


@pytest.mark.parametrize("pool", ["mean", "class"])
@pytest.mark.parametrize("k", [1, 5, 48])  # 48: more than can be decoded
def test_knn_and_ridge_accuracies_match_sklearn(photos: Path, encoder: ViT, pool: Any, k: int):
    train, val = sets(photos)
    measured = measure(encoder, train, val, k=k, pool=pool)
    (x, y, _), (q, t, count) = (plain_features(encoder, loader, pool) for loader in (train, val))
    assert (len(x), len(q), count) == (45, 17, 18)
    k = min(k, 45)

    weighted = KNeighborsClassifier(k, weights=dino_weights).fit(x, y)
    plain = KNeighborsClassifier(k).fit(x, y)
    probabilities = weighted.predict_proba(q)
    first_five = [label in np.argsort(-row)[:5] and row[label] > 0 for row, label in zip(probabilities, t, strict=True)]
    linear = Ridge(alpha=RIDGE * x.var(0, ddof=0).mean() * len(x)).fit(x, np.eye(6)[y])
    assert measured == {
        "knn_top1": (weighted.predict(q) == t).sum() / 18,
        "knn_top5": sum(first_five) / 18,
        "knn_plain_top1": (plain.predict(q) == t).sum() / 18,
        "linear_top1": (linear.predict(q).argmax(1) == t).sum() / 18,
        "judge_by": "none",
        "judge_reason": trusted(ProbeSettings(attentive_steps=0), 0)[1],
    }


def dino_weights(distances: np.ndarray) -> np.ndarray:
    """DINO's neighbor weights exp(cosine / 0.07), from Euclidean distances between unit vectors."""
    return np.exp((1 - distances**2 / 2) / 0.07)


def test_votes_match_sklearn():
    rng = np.random.default_rng(0)
    x, q = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (rng.normal(size=(n, 3)) for n in (200, 90)))
    y = rng.integers(0, 4, 200)
    weighted, plain = votes(*map(torch.from_numpy, (x, y, q)), 15, 4)
    theirs = KNeighborsClassifier(15, weights=dino_weights).fit(x, y).predict_proba(q)
    np.testing.assert_allclose((weighted / weighted.sum(1, keepdim=True)).numpy(), theirs, atol=1e-9)
    np.testing.assert_allclose((plain / 15).numpy(), KNeighborsClassifier(15).fit(x, y).predict_proba(q))


def test_one_near_neighbor_outvotes_two_farther_ones():
    """The near neighbor is of class 1, the farther ones are of class 0: exp(1/.07) > 2 exp(.9/.07)."""
    known = torch.tensor([[1.0, 0.0], [0.9, 0.19**0.5], [0.9, -(0.19**0.5)]])
    weighted, plain = votes(known, torch.tensor([1, 0, 0]), torch.tensor([[1.0, 0.0]]), 3, 3)
    assert weighted[0].tolist() == pytest.approx([2 * math.exp(0.9 / 0.07), math.exp(1 / 0.07), 0])
    assert plain[0].tolist() == [2, 1, 0]


def test_ridge_weights_match_sklearn():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)) + 3, rng.integers(0, 4, 40)
    weight, bias = ridge(torch.from_numpy(x).float(), torch.from_numpy(y), 5)
    x = x.astype(np.float32).astype(float)
    theirs = Ridge(alpha=RIDGE * x.var(0, ddof=0).mean() * len(x)).fit(x, np.eye(5)[y])
    np.testing.assert_allclose(weight.numpy().T, theirs.coef_, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(bias.numpy(), theirs.intercept_, rtol=1e-7, atol=1e-9)


def test_collapsed_encoder_scores_low_and_diverged_one_gives_nan(photos: Path, encoder: ViT):
    train, val = sets(photos)
    torch.nn.init.zeros_(encoder.norm.weight)
    collapsed = measure(encoder, train, val, **FEW)
    assert all(0 <= collapsed[name] <= 0.5 for name in METRICS)
    torch.nn.init.constant_(encoder.norm.bias, float("nan"))
    diverged = measure(encoder, train, val, **FEW)
    assert diverged.pop("judge_by") == "none"
    assert "not finite" in diverged.pop("judge_reason")
    assert list(diverged) == list(names_of(ProbeSettings(**FEW)))
    assert len(diverged) == 9
    assert all(math.isnan(value) for value in diverged.values())


def recipe(photos: Path, folder: Path, **keys: Any) -> str:
    sections = {
        "name": "probed",
        "method": {"name": "lomar", "num_windows": 1, "window_size": 2},
        "model": {"arch": "vit_tiny"},
        "data": {"shards": "none", "image_size": 32, "num_workers": 0},
        "train": {"global_batch_size": 8, "precision": "fp32"},
        "probe": {"train": str(photos / "train"), "val": str(photos / "val"), "every_epochs": 1, "k": 5, **FEW, **keys},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(sections))
    return str(folder / "recipe.yaml")


def test_probe_changes_neither_the_encoder_nor_random_state(photos: Path, tmp_path: Path):
    """The probe measures the current weights, not those at its creation."""
    config = load(recipe(photos, tmp_path), [])
    encoder = ViT("vit_tiny", 16, (2, 2)).train()
    measured = Probe(config, encoder, World(0, 1, 0), CPU)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    before = [parameter.clone() for parameter in encoder.parameters()]
    generators = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    values = measured.measure(encoder)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (np.random.get_state()[1] == generators[1]).all()
    assert random.getstate() == generators[2]
    assert all(module.training for module in encoder.modules())
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), before, strict=True))
    assert values == measure(encoder.eval(), *sets(photos), k=5, **FEW)


def test_probe_of_a_bf16_run_matches_the_command(photos: Path, tmp_path: Path):
    """This holds although the run keeps its residual stream in bf16."""
    encoder = ViT("vit_tiny", 16, (2, 2))
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors", EncoderSpec.of(encoder).to_metadata())
    encoder.residual_dtype = torch.bfloat16
    config = load(recipe(photos, tmp_path), ["train.precision=bf16"])
    in_the_run = Probe(config, encoder, World(0, 1, 0), CPU).measure(encoder)
    data = ["--train", photos / "train", "--val", photos / "val", "--k", 5]
    data += ["--attentive-steps", 3, "--finetune-epochs", 1]
    assert in_the_run == run_in_process(command, tmp_path / "encoder.safetensors", *data)


def test_probe_settings_are_checked_and_not_in_the_resume_signature(photos: Path, tmp_path: Path):
    config = load(recipe(photos, tmp_path), [])
    other = load(recipe(photos, tmp_path), ["probe.k=7", "probe.every_epochs=3"])
    assert config.resume_signature() == other.resume_signature()
    with pytest.raises(ValueError, match=r"unknown key probe\.neighbours"):
        load(recipe(photos, tmp_path), ["probe.neighbours=3"])
    with pytest.raises(ValueError, match=r"k=50 neighbors, but .* has 48 images"):
        Probe(load(recipe(photos, tmp_path), ["probe.k=50"]), ViT("vit_tiny", 16, (2, 2)), World(0, 1, 0), CPU)


def test_probe_blocks_are_checked_when_the_config_loads(photos: Path, tmp_path: Path):
    depth = ARCHS["vit_tiny"].depth
    assert load(recipe(photos, tmp_path), ["probe.block=1"]).probe.block == (1,)
    assert load(recipe(photos, tmp_path, block=[1, 2]), []).probe.block == (1, 2)
    with pytest.raises(ValueError, match=rf"probe\.block: block {depth + 1}: the encoder has blocks 1 to {depth}$"):
        load(recipe(photos, tmp_path), [f"probe.block=1,{depth + 1}"])
    with pytest.raises(ValueError, match=r"probe\.block: blocks 2,1: give each of them once, in ascending order: 1,2"):
        load(recipe(photos, tmp_path), ["probe.block=2,1"])


def test_table_states_which_metric_to_compare_encoders_by(photos: Path, encoder: ViT):
    none, all_of_it = (
        describe(measure(encoder, *sets(photos), **settings))
        for settings in ({}, {"attentive_steps": 1, "finetune_epochs": 2})
    )
    assert "compare encoders by none of these: k-NN and ridge regression do not rank" in none.splitlines()[-1]
    assert [line.split()[0] for line in all_of_it.splitlines()[:-1]] == [
        "finetune_top1",
        "attentive_top1",
        "linear_top1",
        "knn_top1",
    ]
    assert "the encoder after 2 steps of fine-tuning" in all_of_it
    assert "compare encoders by none of these: the fine-tuning had 2 steps on 45 images" in all_of_it


@pytest.mark.parametrize(
    ("settings", "images", "name", "reason"),
    [
        ({"finetune_epochs": 5}, 10_000, "finetune_top1", "had 780 steps, and needs at least 500"),
        ({"finetune_epochs": 4}, 3_030, "attentive_top1", r"had 188 steps on 3030 .* set finetune_epochs to 11, or"),
        ({"finetune_epochs": 11}, 3_030, "finetune_top1", "had 517 steps"),
        ({"finetune_epochs": 5}, 45, "attentive_top1", "had 5 steps on 45 .* set finetune_epochs to 500"),
        ({"finetune_epochs": 5, "attentive_steps": 0}, 45, "none", "had 5 steps .* has 0 steps: set attentive_steps"),
        ({"attentive_steps": 99}, 10_000, "none", "^k-NN .* has 99 steps: set attentive_steps to at least 100"),
        ({"attentive_steps": 100}, 10_000, "attentive_top1", "^the attentive probe sees the patch tokens"),
    ],
)
def test_probe_with_too_few_steps_is_not_trusted(settings: dict[str, int], images: int, name: str, reason: str):
    trusted_name, why = trusted(ProbeSettings(**settings), images)
    assert trusted_name == name
    assert re.search(reason, why), why


def test_incompatible_train_and_val_sets_are_rejected(photos: Path, tmp_path: Path):
    train, val = (load_samples(photos / name) for name in ("train", "val"))
    with pytest.raises(ValueError, match=r"k=49 neighbors, but .*train has 48 images: lower k"):
        check_sets(train, val, 49)
    other = load_samples(write_classes(tmp_path / "other", ["a", "b", "c", "d", "e", "g"], 1))
    with pytest.raises(
        ValueError,
        match=r"label 5 is 'f' in .*train and 'g' in .*other: the probe's train and val need the same classes",
    ):
        check_sets(train, other, 3)
    fewer = load_samples(write_classes(tmp_path / "fewer", NAMES[:5], 1))
    with pytest.raises(
        ValueError, match=r"train has 6 classes, .*fewer has 5: the probe's train and val need the same"
    ):
        check_sets(train, fewer, 3)
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "x.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"1 of 1 samples in .*flat have no label, for example 'x'"):
        check_sets(train, load_samples(flat), 3)
