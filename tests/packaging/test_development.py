"""Developer tooling: `make` lists its targets, `make check` needs no mmcv, hooks run from the environment."""

import re
import shutil
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def dry_run(target: str, folder: Path) -> str:
    """Returns the commands that `make` would run for a target in a clone without an environment."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    done = subprocess.run(["make", "--dry-run", target], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_lists_every_target_with_a_description():
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    shown = subprocess.run(["make", "-C", ROOT, "--no-print-directory"], capture_output=True, text=True, check=True)
    assert sorted(re.findall(r"^make ([\w-]+) +\w", shown.stdout, re.MULTILINE)) == sorted(phony.split())


def test_make_check_needs_no_mmcv_but_make_test_does(tmp_path: Path):
    fast = dry_run("check", tmp_path)
    assert "mypy" in fast
    assert "MMCV_WITH_OPS" not in fast
    everything = dry_run("test", tmp_path)
    assert "mypy" in everything
    assert "MMCV_WITH_OPS" in everything


def test_make_check_ignores_only_paths_that_exist(tmp_path: Path):
    ignored = re.findall(r"--ignore=(\S+)", dry_run("check", tmp_path))
    assert ignored
    assert all((ROOT / path).exists() for path in ignored)


def test_hooks_run_pinned_tools_from_the_environment():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"
    pinned = (ROOT / "constraints.txt").read_text()
    for hook in local["hooks"]:
        assert hook["language"] == "system", hook
        tool = hook["entry"].split()[0]
        assert tool.startswith(".venv/bin/"), hook
        package = tool.removeprefix(".venv/bin/")
        package = "pre-commit-hooks" if package in ("end-of-file-fixer", "check-added-large-files") else package
        assert f"\n{package}==" in pinned, package
