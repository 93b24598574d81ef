from pathlib import Path

import numpy as np
import pytest

from data import samples
from data.decode import decode
from data.index import load_index
from data.reader import ShardReader
from data.samples import main


def test_photographs_are_packed_into_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    assert main([str(tmp_path)]) == 0
    index = load_index(tmp_path)
    assert 200 <= len(index) <= 400
    assert len(index.shards) >= 4
    reader = ShardReader(index)
    crops = [decode(reader.read(sample), lambda w, h: (0, 0, w, h), (64, 64)) for sample in range(0, len(index), 10)]
    assert min(crop.std() for crop in crops) > 10  # not blank
    assert len({crop.tobytes() for crop in crops}) == len(crops)
    assert np.stack(crops).mean() > 30

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main([str(tmp_path)]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_missing_packages_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(samples, "find_spec", lambda name: None)
    assert main([str(tmp_path)]) == 1
    assert 'pip install -e ".[samples]"' in capsys.readouterr().err
