"""A killed run on shards in S3 resumes bitwise identically, and no access key is written anywhere."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import s3_server
from helpers.commands import Command
from helpers.processes import ROOT
from helpers.rank_checks import assert_same_run, wait_for

pytestmark = pytest.mark.engine
OVERRIDES = ("train.epochs=2", "data.shuffle_shards=2")


@pytest.fixture
def bucket(shards: Path) -> Iterator[str]:
    with s3_server.serve_s3():
        for path in shards.glob("*.tar"):
            s3_server.client().upload_file(str(path), s3_server.BUCKET, f"train/{path.name}")
        subprocess.run([sys.executable, "-m", "data.index", "s3://bucket/train"], cwd=ROOT, check=True)
        yield "s3://bucket/train"


def test_killed_run_on_s3_resumes_bitwise_identically(
    bucket: str, write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    recipe = str(write_recipe(tmp_path))
    here = Command([recipe, *OVERRIDES, "name=here"], tmp_path / "here.txt")
    here.outputs()
    assert here.returncode == 0
    stored = (recipe, *OVERRIDES, f"data.shards={bucket}", f"data.cache_dir={tmp_path / 'node'}", "name=stored")
    killed = Command([*stored], tmp_path / "killed.txt")
    folder = tmp_path / "runs" / "stored"
    wait_for(folder / "checkpoints" / "step_00000005" / "manifest.json", killed)
    killed.kill()
    continued = Command([*stored], tmp_path / "continued.txt")
    (output,) = continued.outputs()
    assert continued.returncode == 0, output
    assert "resumes from step_" in output
    assert_same_run(tmp_path / "runs" / "here", folder)
    secrets = [s3_server.ENVIRONMENT[name].encode() for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    for path in (*folder.rglob("*"), *(tmp_path / "node").rglob("*"), *tmp_path.glob("*.txt")):
        if path.is_file():
            content = path.read_bytes()
            assert not any(secret in content for secret in secrets), path
    other = Command([*stored, "data.shuffle_shards=1"], tmp_path / "other.txt")
    (output,) = other.outputs()
    assert other.returncode
    assert "data.shuffle_shards was 2 and is 1" in output
