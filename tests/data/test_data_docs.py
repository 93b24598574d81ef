"""Runs the examples of docs/data.md."""

import re
import subprocess
from pathlib import Path

import pytest
from helpers.shard_tools import jpeg

from data.index import load_index
from data.pack import main

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_shards_with_several_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    for name in "ab":
        (tmp_path / "photos" / f"{name}.jpg").write_bytes(jpeg(0))
    (tmp_path / "photos" / "tags.csv").write_text("file,tags\na.jpg,0 5\nb.jpg,1\n")
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert list(load_index(tmp_path / "shards").keys) == ["a", "b"]
    assert b'{"labels": [0, 5]}' in (tmp_path / "shards" / "train-000000.tar").read_bytes()


def test_list_with_names_as_labels(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in "ab":
        (tmp_path / "photos" / f"{name}.jpg").write_bytes(jpeg(0))
    (example,) = re.findall(r"```bash\n(printf.*?)```", PAGE, re.DOTALL)
    *writes, command = example.replace("/data", str(tmp_path)).strip().splitlines()
    for line in writes:
        subprocess.run(line, shell=True, check=True)
    assert main(command.split()[3:]) == 0
    index = load_index(tmp_path / "shards")
    assert (index.classes, index.label.tolist()) == (("cat", "dog"), [0, 1])


def test_a_tenth_held_out_for_validation(tmp_path: Path) -> None:
    for name in ("cat", "hot dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(10):
            (tmp_path / "photos" / name / f"{number}.jpg").write_bytes(jpeg(0))
    (example,) = re.findall(r"```bash\n(\(cd.*?)```", PAGE, re.DOTALL)
    divide, *commands = example.replace("/data", str(tmp_path)).split("\npython -m data.pack ")
    subprocess.run(divide, shell=True, check=True)
    for command in commands:
        assert main(command.split()) == 0
    train, val = (load_index(tmp_path / "shards" / name) for name in ("train", "val"))
    assert train.classes == val.classes == ("cat", "hot dog")
    assert train.label.tolist() == [0] * 9 + [1] * 9
    assert list(val.keys) == ["cat/9", "hot_dog/9"]
