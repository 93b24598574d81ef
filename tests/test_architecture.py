"""The house rules that a reader relies on, kept by a test: see docs/architecture.md."""

import ast
import json
from pathlib import Path

import pytest

from pretrain.trainer.engine import OWNED

ROOT = Path(__file__).parents[1]
BELOW = {"data": set(), "pretrain": {"data"}, "downstream": {"data", "pretrain"}}
MM = {"mmengine", "mmcv", "mmdet", "mmseg"}


def imports(path: Path) -> set[str]:
    """The top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports here are absolute"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("package", BELOW)
def test_arrows_point_one_way(package: str):
    for path in (ROOT / package).rglob("*.py"):
        outside = imports(path) & (BELOW.keys() | {"tests", "benchmarks"}) - BELOW[package] - {package}
        assert not outside, f"{path} imports {outside}"
        if package != "downstream" or path.parent.name == package:  # mm* have folders of their own
            assert not imports(path) & MM, f"{path} imports {imports(path) & MM}"


def test_ds_configs_hold_engine_keys_only():
    configs = list((ROOT / "ds_configs").glob("*.json"))
    assert len(configs) >= 4
    for path in configs:
        assert not json.loads(path.read_text()).keys() & OWNED.keys(), path


def test_files_are_short_enough_to_read():
    for package in BELOW:
        for path in (ROOT / package).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 320, path
