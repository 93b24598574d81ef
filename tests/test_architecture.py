"""The rules of the architecture that a reader relies on; see docs/architecture.md."""

import ast
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from pretrain.trainer.engine_file import OWNED

ROOT = Path(__file__).parents[1]
BELOW = {"data": set(), "pretrain": {"data"}, "downstream": {"data", "pretrain"}}
MM = {"mmengine", "mmcv", "mmdet", "mmseg"}
MM_FOLDERS = ("downstream.dense", "downstream.detect", "downstream.segment")
# An entry is above everything, and nothing above it: these read weights from files, as `downstream` does.
ENTRIES = ("pretrain.run", "pretrain.reconstruct")
# What the trainer may use of `pretrain`: itself. A method, a model or a task must not be known to it.
TRAINER = "pretrain.trainer"
MAX_FILE, MAX_FUNCTION = 300, 60


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# Configurations of mmengine are files that it reads, not modules.
PATHS = {
    module_name(path): path
    for package in BELOW
    for path in sorted((ROOT / package).rglob("*.py"))
    if "configs" not in path.relative_to(ROOT).parts
}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(PATHS[module].read_text())


@cache
def imported_names(module: str) -> frozenset[str]:
    """Everything that a module imports, anywhere in it, by its full dotted name."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports here are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


@cache
def imported_modules(module: str) -> frozenset[str]:
    """The modules of this project that a module imports, or takes names from."""
    names = imported_names(module)
    direct = names & PATHS.keys()
    return frozenset((direct | {name.rpartition(".")[0] for name in names - direct}) & PATHS.keys() - {module})


def is_in(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("package", BELOW)
def test_arrows_point_one_way(package: str):
    above = BELOW.keys() | {"tests", "benchmarks"}
    for module in PATHS:
        if is_in(module, package) and module not in ENTRIES:
            outside = {name.partition(".")[0] for name in imported_names(module)} & above - BELOW[package] - {package}
            assert not outside, f"{module} imports {outside}"


def test_nothing_imports_the_entries_that_may_import_anything():
    assert not [module for module in PATHS if imported_modules(module) & set(ENTRIES)]


def test_the_trainer_knows_no_method_model_or_task():
    for module in PATHS:
        if is_in(module, TRAINER):
            others = {name for name in imported_modules(module) if not is_in(name, TRAINER, "data")}
            assert not others, f"{module} imports {others}"


def test_mm_libraries_stay_in_their_folders():
    for module in PATHS:
        if not is_in(module, *MM_FOLDERS):
            libraries = {name.partition(".")[0] for name in imported_names(module)} & MM
            assert not libraries, f"{module} imports {libraries}"


def cycles() -> Iterator[list[str]]:
    """Circles of imports: the module graph's strongly connected components of several modules (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(imported_modules(module)):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            at = stack.index(module)
            component = stack[at:]
            del stack[at:]
            if len(component) > 1:
                found.append(sorted(component))

    for module in PATHS:
        if module not in index:
            visit(module)
    yield from found


def test_no_modules_import_each_other_in_a_circle():
    """Neither at the top nor in functions."""
    assert list(cycles()) == []


def test_no_import_is_for_type_checkers_only():
    """It would hide a circle."""
    for module in PATHS:
        names = {node.id for node in ast.walk(tree(module)) if isinstance(node, ast.Name)}
        attributes = {node.attr for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute)}
        assert "TYPE_CHECKING" not in names | attributes, module


def test_files_and_functions_are_short_enough_to_read():
    too_long = []
    for module, path in PATHS.items():
        lines = len(path.read_text().splitlines())
        if lines > MAX_FILE:
            too_long.append(f"{module}: {lines} lines")
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MAX_FUNCTION:
                    too_long.append(f"{module}.{node.name}: {lines} lines")
    assert too_long == []


def test_ds_configs_hold_engine_keys_only():
    configs = list((ROOT / "ds_configs").glob("*.json"))
    assert len(configs) >= 4
    for path in configs:
        assert not json.loads(path.read_text()).keys() & OWNED.keys(), path
