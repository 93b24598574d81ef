"""Labels in .cls and .json members: numbers, names, lists."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.shard_tools import jpeg, write_tar

from data.eval_loader import EvalLoader
from data.index import Index, load_index
from data.labels import check_labels
from data.loader import Loader
from data.multi_labels import MultiLabels
from data.verify import main

SIZE = (8, 8)


def write(folder: Path, labels: list[object], suffix: str = "json", name: str = "a.tar", classes: str = "") -> Index:
    """Writes a shard whose samples have these labels as members, or no member for None; returns the index."""
    members = []
    for number, label in enumerate(labels):
        members.append((f"{number}.jpg", jpeg(number)))
        if label is not None:
            content = json.dumps(label).encode() if suffix == "json" else str(label).encode()
            members.append((f"{number}.{suffix}", content))
    write_tar(folder / name, members)
    if classes:
        (folder / "classes.txt").write_text(classes)
    return load_index(folder)


def test_single_labels_in_json(tmp_path: Path) -> None:
    labels = [
        {"label": 3},
        {"caption": "a label"},
        {"label": "cat"},
        {"label": None},
        {"label": "4"},
        [1],
    ]
    index = write(tmp_path, labels, classes="dog\ncat\n")
    assert index.label.tolist() == [3, -1, 1, -1, 4, -1]
    assert index.label.dtype == np.int32
    assert (index.multi_labels, index.label_problem) == (None, "")


def test_class_names_are_numbered_by_classes_txt(tmp_path: Path) -> None:
    index = write(tmp_path, ["cat", "dog\n", 1, "", "-1"], "cls", classes="\ufeffdog\r\ncat\r\n\r\n")
    assert index.classes == ("dog", "cat")
    assert index.label.tolist() == [1, 0, 1, -1, -1]


def test_unknown_class_name_is_reported_only_when_labels_are_needed(tmp_path: Path) -> None:
    index = write(tmp_path, ["tabby cat", "dog"], "cls")
    assert len(index) == 2  # pretraining needs no labels
    with pytest.raises(ValueError, match=r"sample '0': its label is 'tabby cat', and there is no classes\.txt"):
        check_labels(index, 2, "head.num_classes")
    (tmp_path / "classes.txt").write_text("dog\n")
    with pytest.raises(ValueError, match=r"'tabby cat', which is not in classes\.txt"):
        check_labels(load_index(tmp_path))
    (tmp_path / "classes.txt").write_text("dog\ntabby cat\n")
    index = load_index(tmp_path)
    check_labels(index, 2, "head.num_classes")
    assert index.label.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("label", "quoted"),
    [
        ({"label": 2.5}, "2.5"),
        ({"label": True}, "True"),
        ({"label": -2}, "-2"),
        ({"label": 2**31}, "2147483648"),
        ({"label": [0]}, r"\[0\]"),
        ({"labels": 4}, "'labels' in its .json is 4, not a list"),
        ({"labels": [0, ""]}, "''"),
        ({"labels": ["bird"]}, "'bird', which is not in classes.txt"),
        ({"label": 1, "labels": [1]}, "both 'label' and 'labels'"),
    ],
)
def test_invalid_labels_are_quoted(tmp_path: Path, label: dict[str, object], quoted: str) -> None:
    index = write(tmp_path, [label], classes="dog\ncat\n")
    with pytest.raises(ValueError, match=rf"a\.tar: sample '0': .*{quoted}"):
        check_labels(index)


def test_lists_of_labels(tmp_path: Path) -> None:
    lists: list[object] = [{"labels": [0, 5]}, {"labels": []}, {"labels": ["cat", 2]}]
    write(tmp_path, lists, name="a.tar", classes="dog\ncat\n")
    (tmp_path / "index.npz").unlink()
    built = write(tmp_path, [{"labels": [4]}], name="b.tar")
    for index in (built, load_index(tmp_path)):
        assert index.multi_labels is not None
        assert index.label.tolist() == [-1] * 4
        assert [index.multi_labels[number] for number in range(4)] == [(0, 5), (), (1, 2), (4,)]
        rows = index.multi_labels.rows(np.array([3, 0, 1]), 6)
        assert rows.dtype == np.float32
        assert rows.tolist() == [[0, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1], [0] * 6]
    check_labels(built, 6, "head.num_classes")
    with pytest.raises(ValueError, match=r"'0' in .* has the label 5, which is not in 0\.\.4 \(head\.num_classes=5\)"):
        check_labels(built, 5, "head.num_classes")


def test_fingerprint_and_verify_detect_changed_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path, [{"labels": [0, 5]}, {"labels": [1]}])
    index_file = (tmp_path / "index.npz").read_bytes()
    (tmp_path / "index.npz").unlink()
    after = write(tmp_path, [{"labels": [0, 4]}, {"labels": [1]}])
    assert before.fingerprint != after.fingerprint
    assert main([str(tmp_path), "--num-workers", "1"]) == 0
    assert "labels 0 to 4 in lists of 1.5 on average, 0 without" in capsys.readouterr().out
    (tmp_path / "index.npz").write_bytes(index_file)
    assert main([str(tmp_path), "--num-workers", "1"]) == 1
    assert "(0, 4)" in capsys.readouterr().err


@pytest.mark.parametrize("other", [None, {"label": 3}])
def test_samples_with_and_without_lists_cannot_be_mixed(tmp_path: Path, other: dict[str, int] | None) -> None:
    index = write(tmp_path, [{"labels": [0, 5]}, other, other])
    with pytest.raises(ValueError, match=r"1 samples, such as '0', have a list of labels, and 2, such as '1', have "):
        check_labels(index)


def test_loaders_return_multi_hot_rows(tmp_path: Path) -> None:
    index = write(tmp_path, [{"labels": [number % 3, 3]} for number in range(4)])
    with pytest.raises(ValueError, match="lists of labels, but this needs one label per sample"):
        Loader(index, size=SIZE, batch=4, seed=0, labels=True)
    ((batch,),) = Loader(index, size=SIZE, batch=4, seed=0, labels=True, num_classes=5).batches(0, 1)
    assert batch.labels is not None
    assert batch.labels.dtype == torch.float32
    expected = index.multi_labels.rows(batch.samples.numpy(), 5)  # type: ignore[union-attr]
    assert np.array_equal(batch.labels.numpy(), expected)
    (padded,) = EvalLoader(index, size=SIZE, batch=5, num_classes=5).batches()
    assert padded.labels.tolist() == [[1, 0, 0, 1, 0], [0, 1, 0, 1, 0], [0, 0, 1, 1, 0], [1, 0, 0, 1, 0], [0] * 5]
    (single,) = EvalLoader(index, size=SIZE, batch=5).batches()
    assert single.labels.tolist() == [-1] * 5


def test_single_labels_stay_numbers_whatever_num_classes_is(tmp_path: Path) -> None:
    index = write(tmp_path, [1, 0, 2, 2], "cls")
    ((batch,),) = Loader(index, size=SIZE, batch=4, seed=0, labels=True, num_classes=5).batches(0, 1)
    assert batch.labels is not None
    assert batch.labels.tolist() == index.label[batch.samples.numpy()].tolist()


def test_joined_parts_equal_the_whole() -> None:
    whole = MultiLabels.of([(1, 2), (), (3,), (), (4, 5, 6)])
    for cut in range(6):
        joined = MultiLabels.join([whole.part(0, cut), whole.part(cut, 5)])
        assert np.array_equal(joined.classes, whole.classes)
        assert np.array_equal(joined.ends, whole.ends)


def test_index_of_an_earlier_version_is_rebuilt(tmp_path: Path) -> None:
    index = write(tmp_path, [{"label": 1}])
    with np.load(tmp_path / "index.npz") as stored:
        fields = dict(stored)
    expected = index.label.tolist()  # read before its memory-mapped file is overwritten
    del fields["label_problem"]
    np.savez(tmp_path / "index.npz", **{**fields, "format": np.array(1), "label": np.array([-1], np.int32)})
    assert load_index(tmp_path).label.tolist() == expected == [1]
