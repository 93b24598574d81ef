"""The wheel contains every package and data file and works outside the repository."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from helpers.waiting import SECONDS

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
ROOT = Path(__file__).parents[2]
TREES = ("data", "pretrain", "downstream", "ds_configs")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def tree_files() -> list[Path]:
    """Returns all files of the packages, relative to the root."""
    found = [path.relative_to(ROOT) for tree in TREES for path in (ROOT / tree).rglob("*") if path.is_file()]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def run(*command: object, cwd: Path, site: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "PYTHONPATH")}
    environment |= {"PYTHONPATH": str(site)} if site else {}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the wheel from a copy of the source, because setuptools leaves a build folder behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for tree in TREES:
        shutil.copytree(ROOT / tree, source / tree, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", out, source]
    run(*build, cwd=source)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Installs the wheel into a separate folder."""
    site = tmp_path_factory.mktemp("site")
    run("-m", "pip", "install", "--no-deps", "--no-compile", "--quiet", "--target", site, wheel, cwd=site)
    return site


def test_pyproject_lists_every_package():
    packages = {".".join(path.parent.parts) for path in tree_files()}
    assert packages == set(PROJECT["tool"]["setuptools"]["packages"])


def test_package_data_covers_every_non_python_file():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["*"]
    others = [path for path in tree_files() if path.suffix != ".py"]
    assert len(others) > 50
    assert [path for path in others if not any(path.match(pattern) for pattern in patterns)] == []


def test_wheel_contains_every_file(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {path.as_posix() for path in tree_files()}
    assert wheel.name.startswith(f"lomar_deepspeed-{PROJECT['project']['version']}-")


LOAD_EVERYTHING = """
import json, sys
from pathlib import Path
import pretrain.config, pretrain.trainer.engine_file as engine, downstream.classify.config as classify
root = Path(pretrain.__file__).parents[1]
weights = Path("weights"); weights.touch()
for recipe in pretrain.config.RECIPES.glob("*.yaml"):
    tokens = [f"target.weights={weights}"] if "beit" in recipe.stem else []
    pretrain.config.load(recipe.stem, ["data.shards=/nowhere", *tokens])
for recipe in classify.RECIPES.glob("*.yaml"):
    classify.load(recipe.stem, ["data.shards=/nowhere", "val.shards=/nowhere", "start.checkpoint=/nowhere"])
stages = {path.stem: engine.read_ds_config(path.stem) for path in (root / "ds_configs").glob("*.json")}
counts = [len(list(folder.glob("*.yaml"))) for folder in (pretrain.config.RECIPES, classify.RECIPES)]
print(json.dumps({"root": str(root), "stages": sorted(stages), "recipes": counts}))
"""


def test_installed_wheel_loads_every_recipe_and_engine_config(site: Path, tmp_path: Path):
    loaded = json.loads(run("-c", LOAD_EVERYTHING, cwd=tmp_path, site=site))
    shipped = [sorted((ROOT / tree / "recipes").glob("*.yaml")) for tree in ("pretrain", "downstream/classify")]
    assert loaded == {
        "root": str(site),
        "stages": sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json")),
        "recipes": [len(recipes) for recipes in shipped],
    }


def test_installed_wheel_prints_version_and_help(site: Path, tmp_path: Path):
    version = run("-m", "pretrain.run", "--version", cwd=tmp_path, site=site)
    assert version == f"lomar-deepspeed {PROJECT['project']['version']}\n"
    usage = run("-m", "downstream.classify.finetune", "--help", cwd=tmp_path, site=site)
    assert "section.key=value" in usage


@pytest.mark.engine
def test_installed_wheel_packs_and_trains(site: Path, tmp_path: Path):
    run("-m", "data.samples", "shards", cwd=tmp_path, site=site)
    keys = {
        "name": "tiny",
        "method": {"name": "lomar", "num_windows": 2, "window_size": 3},
        "model": {"arch": "vit_tiny"},
        "data": {"shards": "shards", "image_size": 64, "num_workers": 1},
        "optim": {"warmup_epochs": 0},
        "train": {"epochs": 1, "global_batch_size": 32, "precision": "fp32", "ds_config": "zero2"},
        "log": {"every_steps": 1, "num_reconstructions": 2},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(keys))
    output = run("-m", "pretrain.run", "tiny.yaml", cwd=tmp_path, site=site)
    assert "not a git checkout" in output
    folder = tmp_path / "runs" / "tiny"
    assert (folder / "encoder.safetensors").is_file()
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["lomar-deepspeed"] == PROJECT["project"]["version"]
    assert environment["deepspeed"]["zero_stage"] == 2
