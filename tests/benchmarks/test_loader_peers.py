"""benchmarks/loader_peers.py: installed loaders are timed on all photographs, and absent ones are named."""

import json
from pathlib import Path

import pytest
from helpers.shard_tools import jpeg, write_tar

from benchmarks import loader_peers


def test_installed_loaders_are_timed_and_absent_ones_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = tmp_path / "photographs.tar"
    write_tar(tar, [(f"{i}.jpg", jpeg(i, 60 + i, 50)) for i in range(70)] + [("a.png", b"no JPEG")])
    absent = loader_peers.Contender(loader_peers.ours, "no_such.package")
    kept = {name: loader_peers.CONTENDERS[name] for name in ("ours", "ours_repeats2", "torchvision", "webdataset")}
    monkeypatch.setattr(loader_peers, "CONTENDERS", {**kept, "absent": absent})
    loader_peers.main([str(tar), "--quick", "--workers", "0", "1", "--size", "32"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "absent: not installed, left out"
    assert lines[1].startswith("64 photographs at 32 pixels")
    figures = json.loads(lines[-1])
    for name in kept:
        assert figures[f"cpu_ms_{name}_0"] > 0
        assert figures[f"per_s_{name}_1"] > 0
    assert figures["ratio_ours_0"] == 1
    assert "ratio_absent_0" not in figures
