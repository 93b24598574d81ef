"""Tests that the worked example in CONTRIBUTING.md works as written when added to a copy of the project."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.waiting import SECONDS
from PIL import Image
from safetensors import safe_open

ROOT = Path(__file__).parents[2]
COPIED = ("data", "pretrain", "downstream", "ds_configs", "tests/helpers", "tests/conftest.py", "pyproject.toml")


def code_block(text: str, file: str, language: str) -> str:
    """The code block after the paragraph that names `file`."""
    found = re.search(rf"`{re.escape(file)}`(?:(?!\n\n).)*\n\n```{language}\n(.*?)```", text, re.DOTALL)
    assert found, f"CONTRIBUTING.md has no {language} block for {file}"
    return found[1]


def apply_diff(path: Path, diff: str) -> None:
    """Replaces each hunk's old lines, which must occur exactly once in the file, with its new ones."""
    source = path.read_text()
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if not line.startswith("+"))
        new = "".join(line[1:] for line in lines if not line.startswith("-"))
        assert source.count(old) == 1, f"{path.name} has changed; CONTRIBUTING.md shows:\n{old}"
        source = source.replace(old, new)
    path.write_text(source)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the example added."""
    copy = tmp_path_factory.mktemp("project")
    for name in COPIED:
        source, target = ROOT / name, copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for file, language in {
        "pretrain/methods/inpainting.py": "python",
        "pretrain/recipes/inpainting_vitb16_224_300e.yaml": "yaml",
        "tests/pretrain/test_inpainting.py": "python",
    }.items():
        (copy / file).parent.mkdir(exist_ok=True)
        (copy / file).write_text(code_block(text, file, language))
    apply_diff(copy / "pretrain/methods/__init__.py", code_block(text, "pretrain/methods/__init__.py", "diff"))
    return copy


def run(project: Path, *command: str) -> str:
    result = subprocess.run(
        [sys.executable, *command],
        cwd=project,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=SECONDS,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.mark.slow
def test_example_passes_its_own_tests(project: Path):
    output = run(project, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/pretrain/test_inpainting.py")
    assert "6 passed" in output


def test_example_passes_ruff(project: Path):
    files = ("pretrain/methods/inpainting.py", "pretrain/methods/__init__.py", "tests/pretrain/test_inpainting.py")
    run(project, "-m", "ruff", "format", "--check", "--no-cache", *files)
    run(project, "-m", "ruff", "check", "--no-cache", *files)


@pytest.mark.engine
def test_example_passes_mypy_and_trains_with_the_usual_command(project: Path, tmp_path: Path):
    run(project, "-m", "mypy", "--no-incremental", "-p", "pretrain.methods")
    rng = np.random.default_rng(0)
    for number in range(32):
        Image.fromarray(rng.integers(0, 256, (80, 96, 3), dtype=np.uint8)).save(tmp_path / f"{number}.jpg")
    run(project, "-m", "data.pack", str(tmp_path), "shards")
    keys = "name=try model.arch=vit_tiny data.image_size=64 data.num_workers=0 method.hole_size=2 train.epochs=2 \
        train.global_batch_size=16 train.gradient_accumulation_steps=1 optim.warmup_epochs=1 train.precision=fp32"
    run(project, "pretrain/run.py", "inpainting_vitb16_224_300e", "data.shards=shards", *keys.split())
    folder = project / "runs" / "try"
    assert (folder / "reconstructions.png").exists()
    assert yaml.safe_load((folder / "config.yaml").read_text())["method"] == {
        "name": "inpainting",
        "module": None,
        "hole_size": 2,
    }
    with safe_open(folder / "encoder.safetensors", "pt") as file:
        assert file.metadata()["method"] == "inpainting"


def test_engine_test_line_is_a_valid_dictionary_entry():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    entry = code_block(text, "tests/engine/test_every_method.py", "python")
    assert eval(f"{{{entry}}}", {"RELATIVE": {"arch": "vit_tiny"}})["inpainting"]["method"]["name"] == "inpainting"
