"""The folder of a run: where what is compiled goes."""

import os
from pathlib import Path

import pytest
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from pretrain.trainer.run_folder import RunFolder


def test_what_is_compiled_goes_into_the_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also when an import has already set torch's default."""
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    assert cache_dir() == default_cache_dir(), "torch sets the variable itself"
    RunFolder(tmp_path / "run").cache_compiled()
    assert cache_dir() == str(tmp_path / "run/compiled/torchinductor")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "run/compiled/triton")


def test_the_environments_own_caches_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/cache/inductor")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/cache/triton")
    RunFolder(tmp_path / "run").cache_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/cache/inductor"
    assert os.environ["TRITON_CACHE_DIR"] == "/cache/triton"
