"""Tests of multi-label shards: classes, training batches, metrics and predictions."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.labeled_images import run_in_process
from helpers.shard_tools import jpeg, write_tar
from helpers.tiny_classifier import SIZE, configure, encoder_file
from sklearn.metrics import average_precision_score

from data.eval_loader import EvalLoader
from data.image_folder import load_samples
from downstream import embed
from downstream.classify import evaluate, predict
from downstream.classify.checks import check_train_and_val, with_classes_of_data
from downstream.classify.finish import save_classifier
from downstream.classify.model import Classifier, build_classifier
from downstream.classify.sweep import find_metric
from downstream.classify.trained_classifier import load_classifier
from pretrain.probe.measure import check_sets
from pretrain.trainer.assemble import build_loader
from pretrain.trainer.launch import World

CPU = torch.device("cpu")
NAMES = ("cat", "dog", "owl", "yak")  # no image has the last


def write_shards(folder: Path, count: int, seed: int) -> Path:
    """Write `count` images with lists of class names, some of them empty. The third image cannot be decoded."""
    rng = np.random.default_rng(seed)
    members = []
    for number in range(count):
        labels = [name for name in NAMES[:3] if rng.random() < 0.4]
        members += [(f"{number:03d}.jpg", b"none" if number == 2 else jpeg(seed + number))]
        members += [(f"{number:03d}.json", json.dumps({"labels": labels}).encode())]
    folder.mkdir()
    write_tar(folder / "0.tar", members)
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in NAMES))
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", 16, seed=0)


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A saved classifier whose predictions differ from image to image."""
    config = configure(tmp_path, head__num_classes=4)
    torch.manual_seed(1)
    model, _ = build_classifier(config, NAMES)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    save_classifier(model.state_dict(), config, NAMES, tmp_path / "model.safetensors", multi_label=True)
    return tmp_path / "model.safetensors"


def logits(classifier: Path, data: Path) -> np.ndarray:
    """Compute logits image by image, with -1e30 for undecodable images."""
    trained, found = load_classifier(classifier, CPU), []
    assert trained.multi_label
    for batch in EvalLoader(load_samples(data), size=SIZE, batch=1).batches():
        with torch.no_grad():
            found.append(trained.predict(batch.images)[0].numpy() if batch.readable[0] else np.full(4, -1e30))
    return np.array(found)


def test_batches_have_multi_hot_labels_that_the_loss_accepts(shards: Path, tmp_path: Path):
    index = load_samples(shards)
    config = with_classes_of_data(configure(tmp_path, head__num_classes="null", data__num_workers=0), index, index)
    assert config.head.num_classes == 4
    loader = build_loader(config, index, World(0, 1, 0), labels=True, num_classes=config.head.num_classes)
    model: Classifier = build_classifier(config)[0]
    ((batch,),) = loader.batches(0, 1)
    assert batch.labels.shape == (8, 4)
    shown = [[float(label in index.multi_labels[sample]) for label in range(4)] for sample in batch.samples.tolist()]
    assert batch.labels.tolist() == shown
    assert model(batch.images, **batch.model_inputs())["loss"].item() == pytest.approx(np.log(2), abs=0.01)


def test_mean_average_precision_matches_sklearn(shards: Path, classifier: Path, tmp_path: Path):
    result = run_in_process(evaluate, classifier, "--data", shards, "--out", tmp_path / "report")
    index = load_samples(shards)
    truth, scores = index.multi_labels.rows(np.arange(16), 4), logits(classifier, shards)
    expected = [average_precision_score(truth[:, label], scores[:, label]) for label in range(3)]
    assert result == {"map": pytest.approx(np.mean(expected)), "images": 16, "skipped": 1}
    with (tmp_path / "report" / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(NAMES)
    assert [int(row["images"]) for row in rows] == truth.sum(0).tolist()
    assert [float(row["average precision"]) for row in rows[:3]] == pytest.approx(expected, abs=1e-6)
    assert rows[3]["average precision"] == ""
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["per_class.csv"]


def test_sweep_compares_multi_label_runs_by_map(shards: Path, classifier: Path):
    measured = run_in_process(evaluate, classifier, "--data", shards)
    assert find_metric({**measured, "ema_map": 1.0}) == "map"
    assert find_metric({"top1": 0.5, "top5": 1.0}) == "top1"


def test_each_class_is_predicted_independently(shards: Path, classifier: Path, capsys: pytest.CaptureFixture[str]):
    run_in_process(predict, classifier, shards)
    printed = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    probabilities = 1 / (1 + np.exp(-logits(classifier, shards).clip(-500)))
    assert {len(printed[name].split(", ")) for name in printed} > {1}, "several classes of one image"
    for (name, text), row in zip(printed.items(), probabilities, strict=True):
        expected = [f"{NAMES[label]} {row[label]:.1%}" for label in np.argsort(-row) if row[label] >= 0.5]
        assert text == (", ".join(expected) or "-"), name


def test_feature_table_lists_all_classes_of_an_image(shards: Path, tmp_path: Path):
    run_in_process(embed, encoder_file(tmp_path), shards, tmp_path / "features.npy")
    lists = load_samples(shards).multi_labels
    with (tmp_path / "features.csv").open(newline="") as file:
        for sample, row in enumerate(csv.DictReader(file)):
            assert row["label"] == ";".join(str(label) for label in lists[sample])
            assert row["class"] == ";".join(NAMES[label] for label in lists[sample])


def test_multi_label_data_is_rejected_where_one_label_is_needed(shards: Path, tmp_path: Path):
    members = [("a.jpg", jpeg(0)), ("a.cls", b"1"), ("b.jpg", jpeg(1)), ("b.cls", b"0")]
    single = tmp_path / "single"
    single.mkdir()
    write_tar(single / "0.tar", members)
    lists, one = load_samples(shards), load_samples(single)
    with pytest.raises(ValueError, match=r"data\.shards \(.*\) has lists of labels, val\.shards .* one label per"):
        check_train_and_val(lists, one, 4)
    with pytest.raises(ValueError, match=r"has lists of labels, but a probe needs one label for each image"):
        check_sets(lists, lists, 3)
