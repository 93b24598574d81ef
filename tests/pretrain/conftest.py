"""A small recipe for the configuration tests."""

from pathlib import Path

import pytest


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(
        "name: small\nmethod: {name: lomar, num_windows: 2}\ndata: {shards: /nowhere}\noptim: {warmup_epochs: 5}\n"
    )
    return str(path)
