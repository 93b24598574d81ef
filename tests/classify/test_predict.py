"""Tests of predictions on unlabelled images: the most probable classes by name, as text and as a table."""

import csv
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.labeled_images import run_in_process, write_classes, write_classifier, write_photo

from data.eval_loader import EvalLoader
from data.image_folder import load_samples
from data.pack import pack
from data.sources import list_source
from downstream.classify import predict
from downstream.classify.trained_classifier import load_classifier
from downstream.own_images import load_images

CPU = torch.device("cpu")
NAMES = [f"c{number}" for number in range(7)]


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    return write_classifier(tmp_path / "model.safetensors", 7, class_names=NAMES)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six photographs at several folder depths, one of which cannot be decoded."""
    folder = tmp_path / "photos"
    for number, name in enumerate(["a.jpg", "trip/b.jpg", "trip/day 2/c.jpg", "trip/day 2/d.jpg", "x/y/z/e.jpg"]):
        write_photo(folder / name, number)
    (folder / "trip" / "bad.jpg").write_bytes(b"none")
    return folder


def test_table_has_the_top_classes_of_every_image(
    classifier: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out" / "predictions.csv"
    result = run_in_process(predict, classifier, photos, "--top", 3, "--out", out)
    assert result == {"images": 6, "skipped": 1, "out": str(out)}
    assert "1 of 6 images cannot be decoded and have no prediction: trip/bad" in capsys.readouterr().err
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == [
        "a.jpg",
        "trip/b.jpg",
        "trip/bad.jpg",
        "trip/day 2/c.jpg",
        "trip/day 2/d.jpg",
        "x/y/z/e.jpg",
    ]
    trained = load_classifier(classifier, CPU)
    for row, batch in zip(rows, EvalLoader(load_samples(photos), size=(32, 32), batch=1).batches(), strict=True):
        if row["key"] == "trip/bad.jpg":
            assert set(row.values()) == {"trip/bad.jpg", ""}
            continue
        with torch.no_grad():
            probabilities = trained.predict(batch.images)[0].double().softmax(0)
        best = probabilities.argsort(descending=True)[:3].tolist()
        assert [row[f"class_{place}"] for place in (1, 2, 3)] == [NAMES[label] for label in best]
        written = [float(row[f"probability_{place}"]) for place in (1, 2, 3)]
        assert written == pytest.approx([probabilities[label].item() for label in best], abs=2e-6)


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, str]:
    """Run the command and return the text printed for each image."""
    run_in_process(predict, *arguments)
    return dict(line.split(": ") for line in capsys.readouterr().out.splitlines())


def test_prediction_of_one_image_is_printed(classifier: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    printed_texts = printed(capsys, classifier, photos / "trip" / "day 2" / "c.jpg", "--top", 2)
    assert list(printed_texts) == ["c.jpg"]
    assert re.fullmatch(r"c\d \d+\.\d%, c\d \d+\.\d%", printed_texts["c.jpg"])


def test_file_name_that_is_not_utf8_is_escaped(
    classifier: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    os.rename(photos / "a.jpg", os.fsencode(photos) + b"/na\xefve, no.jpg")
    assert r"na\xefve, no.jpg" in printed(capsys, classifier, photos)
    run_in_process(predict, classifier, photos, "--out", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        assert next(csv.DictReader(file))["key"] == r"na\xefve, no.jpg"


def test_images_that_differ_only_in_extension_are_both_predicted(
    classifier: Path, photos: Path, capsys: pytest.CaptureFixture[str]
):
    """Cameras write such pairs. Shards could not hold both."""
    write_photo(photos / "a.png", 9)
    assert list(printed(capsys, classifier, photos))[:2] == ["a.jpg", "a.png"]


def test_threshold_leaves_out_unlikely_classes(classifier: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    everything, likely, certain = (
        printed(capsys, classifier, photos, "--threshold", threshold) for threshold in (0, 0.3, 1)
    )
    assert set(certain.values()) == {"-"}
    for name, text in likely.items():
        expected = [part for part in everything[name].split(", ") if "%" in part and float(part.split()[1][:-1]) >= 30]
        assert text == (", ".join(expected) or "-")
    assert likely != everything


def test_classes_without_names_are_printed_as_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pack(list_source(write_classes(tmp_path / "classes", NAMES[:2], 2)), tmp_path / "shards")
    unnamed = write_classifier(tmp_path / "unnamed.safetensors", 7)
    printed_texts = printed(capsys, unnamed, tmp_path / "shards", "--top", 1)
    assert list(printed_texts) == ["c0/000", "c0/002", "c1/001", "c1/003"]
    assert all(re.fullmatch(r"[0-6] \d+\.\d%", line) for line in printed_texts.values())


def test_imagenet_classes_are_printed_with_readable_names(classifier: Path):
    trained = load_classifier(classifier, CPU)
    assert predict.name_classes(trained) == NAMES
    assert predict.name_classes(replace(trained, class_names=())) == list("0123456")
    cats = replace(trained, class_names=("n02124075", "n02012849", "n03126707"))
    assert predict.name_classes(cats) == ["Egyptian cat (n02124075)", "crane (n02012849)", "crane (n03126707)"]
    assert predict.name_classes(replace(trained, class_names=("n00000000",))) == ["n00000000"]


def test_paths_that_are_not_images_are_rejected(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(ValueError, match=r"notes\.txt is not an image \(jpg, .*give image files, one folder"):
        load_images(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="nothing does not exist: give images, a folder of images or shards"):
        load_images(tmp_path / "nothing")
