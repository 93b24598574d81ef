"""Architecture rules that readers rely on; see docs/architecture.md."""

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
# Entry points may import anything, and nothing may import them: they read weights from files, as `downstream` does.
ENTRIES = ("pretrain.run", "pretrain.reconstruct")
# The trainer may import only itself and `data`. It must not know about any method, model or task.
TRAINER = "pretrain.trainer"
MAX_FILE, MAX_FUNCTION = 300, 60


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# mmengine configs are files that mmengine reads, not modules.
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
    """Full dotted names of everything that a module imports, at any level."""
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
    """The modules of this project that a module imports or imports names from."""
    names = imported_names(module)
    direct = names & PATHS.keys()
    return frozenset((direct | {name.rpartition(".")[0] for name in names - direct}) & PATHS.keys() - {module})


def is_in(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("package", BELOW)
def test_packages_import_only_packages_below_them(package: str):
    above = BELOW.keys() | {"tests", "benchmarks"}
    for module in PATHS:
        if is_in(module, package) and module not in ENTRIES:
            outside = {name.partition(".")[0] for name in imported_names(module)} & above - BELOW[package] - {package}
            assert not outside, f"{module} imports {outside}"


def test_no_module_imports_an_entry_point():
    assert not [module for module in PATHS if imported_modules(module) & set(ENTRIES)]


def test_trainer_imports_no_method_model_or_task():
    for module in PATHS:
        if is_in(module, TRAINER):
            others = {name for name in imported_modules(module) if not is_in(name, TRAINER, "data")}
            assert not others, f"{module} imports {others}"


def test_mm_libraries_are_imported_only_in_their_folders():
    for module in PATHS:
        if not is_in(module, *MM_FOLDERS):
            libraries = {name.partition(".")[0] for name in imported_names(module)} & MM
            assert not libraries, f"{module} imports {libraries}"


def cycles() -> Iterator[list[str]]:
    """Import cycles: strongly connected components of more than one module (Tarjan)."""
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


def test_no_import_cycles():
    """Counts imports at module level and inside functions."""
    assert list(cycles()) == []


def test_no_type_checking_only_imports():
    """`TYPE_CHECKING` would hide a cycle."""
    for module in PATHS:
        names = {node.id for node in ast.walk(tree(module)) if isinstance(node, ast.Name)}
        attributes = {node.attr for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute)}
        assert "TYPE_CHECKING" not in names | attributes, module


def test_files_and_functions_are_not_too_long():
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


def test_ds_configs_do_not_set_keys_owned_by_the_trainer():
    configs = list((ROOT / "ds_configs").glob("*.json"))
    assert len(configs) >= 4
    for path in configs:
        assert not json.loads(path.read_text()).keys() & OWNED.keys(), path
