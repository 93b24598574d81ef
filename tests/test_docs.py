"""Everything that the docs refer to exists: links, commands with recipes and overrides, files, configuration keys."""

import ast
import functools
import importlib
import inspect
import itertools
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from downstream.classify.config import FinetuneConfig
from downstream.classify.config import load as load_finetune
from downstream.classify.sweep import configure, parse_grid
from pretrain.config import PretrainConfig
from pretrain.config import load as load_pretrain

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md") for path in ROOT.glob(pattern))
RECIPES = sorted([*ROOT.glob("pretrain/recipes/*.yaml"), *ROOT.glob("downstream/classify/recipes/*.yaml")])
CONFIGS = sorted([*ROOT.glob("downstream/detect/configs/*.py"), *ROOT.glob("downstream/segment/configs/*.py")])
JOBS = sorted(ROOT.glob("slurm/*.sh"))
FOLDERS = "data|pretrain|downstream|ds_configs|slurm|benchmarks|tests|docs"
EXAMPLE = "inpainting"  # CONTRIBUTING.md adds it; tests/pretrain/test_contributing.py runs it
OWN_CONFIG = "birds.py"  # docs/detection.md shows it; tests/detect/test_detect_configs.py loads it

# Where commands that take a recipe or a config look for it.
SHIPPED = {
    "pretrain/run.py": ("pretrain/recipes", "yaml"),
    "downstream/classify/finetune.py": ("downstream/classify/recipes", "yaml"),
    "downstream.classify.sweep": ("downstream/classify/recipes", "yaml"),
    "downstream/detect/train_detector.py": ("downstream/detect/configs", "py"),
    "downstream/segment/train_segmentor.py": ("downstream/segment/configs", "py"),
    "downstream.segment.check_masks": ("downstream/segment/configs", "py"),
}


def for_each(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


def read(path: Path) -> str:
    """A page's text, without the old names in the changelog's tables."""
    text = path.read_text()
    return re.sub(r"^\| `[^|]+` \|", "|", text, flags=re.MULTILINE) if path.name == "CHANGELOG.md" else text


# Links


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub generates for a page's headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@for_each(PAGES)
def test_link_targets_exist(path: Path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(page), f"{target}: no such heading"


# Commands


def commands(path: Path) -> Iterator[list[str]]:
    """The words of each python, deepspeed, torchrun or sbatch command; lines with placeholders are skipped."""
    text = read(path)
    if path.suffix != ".md":
        comments = (line.removeprefix("#") for line in text.splitlines() if line.startswith("#"))
        text = text.split('"""')[1] if path.suffix == ".py" else "\n".join(comments)
    text = text.replace("\\\n", " ").replace("`", "\n")
    for line in text.splitlines():
        if re.search(r"\b(python|deepspeed|torchrun|sbatch)\b", line) and not re.search(
            r"\[|RECIPE\b|\.\.\.$|^\s*-", line
        ):
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # prose with an apostrophe
                continue
            for place, word in enumerate(words):
                if word in ("python", "deepspeed", "torchrun", "sbatch"):
                    yield words[place:]
                    break


def split_command(words: list[str]) -> tuple[str, list[str]] | None:
    """(script or module, its arguments) of a command; None if it runs nothing from this project."""
    if "-m" in words[:4]:
        place = words.index("-m") + 1
    else:
        place = next((n for n, word in enumerate(words) if re.fullmatch(rf"(?:{FOLDERS})/\S+\.(?:py|sh)", word)), 0)
    return (words[place], words[place + 1 :]) if place else None


ALL = [*PAGES, *RECIPES, *CONFIGS, *JOBS]


@for_each(ALL)
def test_commands_and_their_options_exist(path: Path):
    for words in commands(path):
        target, arguments = split_command(words) or (None, [])
        if target is None or not re.match(rf"(?:{FOLDERS})[/.]", target):
            continue
        module = target.replace(".", "/")
        files = [target] if "/" in target else [f"{module}.py", f"{module}/__main__.py"]
        file = next((ROOT / name for name in files if (ROOT / name).is_file()), None)
        assert file, f"{target}: no such command"
        shared = ROOT / "pretrain/trainer/main.py"  # options shared by all training commands
        parsers = "".join(parser.read_text() for parser in [*file.parent.glob("*.py"), shared])
        for option in (word for word in arguments if word.startswith("--")):
            assert f'"{option}"' in parsers, f"{target} {option}: no such option"
        if arguments[:1] == ["--show"]:
            arguments = arguments[1:]
        if target in SHIPPED and arguments and arguments[0] not in ("--recipes", "--keys"):
            check_arguments(target, arguments)


@for_each(PAGES)
def test_make_targets_exist(path: Path):
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make (?:[A-Z]+=\S+ )?([a-z]+)", read(path), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}: no such target"


def check_arguments(target: str, arguments: list[str]) -> None:
    """Checks that the recipe or config exists and accepts the overrides."""
    folder, suffix = SHIPPED[target]
    name, overrides = arguments[0], arguments[1:]
    if any(EXAMPLE in word for word in arguments) or name == OWN_CONFIG:
        return
    shipped = ROOT / folder / f"{name}.{suffix}"
    assert shipped.is_file() or (ROOT / name).is_file(), f"{target} {name}: no such recipe"
    recipe = str(shipped if shipped.is_file() else ROOT / name)
    if target == "downstream.classify.sweep":
        grid = [value for option, value in itertools.pairwise(overrides) if option == "--grid"]
        keys = [word for word in overrides if "=" in word and word not in grid]
        configure(recipe, keys, parse_grid(grid))
    elif suffix == "py":
        texts = [path.read_text() for path in [shipped, *shipped.parent.glob("_base_/*.py")]]
        for key in (word.partition("=")[0] for word in overrides if "=" in word):
            is_mmengine_key = any(re.search(rf"^{key.split('.')[0]} = ", text, re.MULTILINE) for text in texts)
            assert key in run_keys() or is_mmengine_key, f"{target} {name} {key}=: no such key"
    else:
        problem = load_error(load_pretrain if target == "pretrain/run.py" else load_finetune, recipe, overrides)
        # Allowed: the reader's own files, and required keys that an abbreviated command omits.
        assert problem is None or re.search(r"'?/data/|is not set", problem), problem


@functools.cache
def run_keys() -> set[str]:
    """The keys that detection and segmentation add to mmengine's, read without importing mmengine."""
    source = (ROOT / "downstream/dense/mmengine/config_file.py").read_text()
    (value,) = (
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "_RUN_KEYS"
    )
    return set(ast.literal_eval(value))


def load_error(load: Callable[[str, list[str]], Any], recipe: str, overrides: list[str]) -> str | None:
    """The error message if a recipe rejects the overrides, else None."""
    try:
        load(recipe, [word for word in overrides if "=" in word])
    except ValueError as error:
        return str(error)
    return None


@for_each(sorted(ROOT.glob("docs/*.md")))
def test_python_examples_call_existing_functions(path: Path):
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
        tree, imported = ast.parse(block), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                imported |= {name.name: getattr(module, name.name) for name in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported:
                keywords = {keyword.arg or "": None for keyword in node.keywords}
                inspect.signature(imported[node.func.id]).bind(*node.args, **keywords)


# Files


@for_each(PAGES)
def test_mentioned_files_exist(path: Path):
    for cell in re.split(r"[|\n]", read(path)):
        for name in re.findall(rf"`((?:{FOLDERS})/[^`\s]+)`(?! \(new)", cell):
            if "<" in name or EXAMPLE in name:
                continue
            choices = re.split(r"[{},]", name)
            names = [name] if len(choices) == 1 else [choices[0] + part + choices[-1] for part in choices[1:-1]]
            for single in names:
                assert list(ROOT.glob(single.rstrip("/"))), f"{single}: no such file"


def test_architecture_map_lists_exactly_the_existing_modules():
    page = (ROOT / "docs/architecture.md").read_text()
    drawn = set(re.findall(r"\b(\w+)\.py\b", page.split("```")[1]))
    existing = {
        path.stem
        for package in ("data", "pretrain", "downstream")
        for path in (ROOT / package).rglob("*.py")
        if path.stem not in ("__init__", "__main__") and "configs" not in path.parts
    }
    assert drawn - existing == set(), "on the map, but not there"
    assert existing - drawn == set(), "not on the map"


# Configuration keys


def sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [section for inner in get_args(annotation) for section in sections(inner)]


def exists(key: str) -> bool:
    """Whether a dotted key exists in pretraining or fine-tuning; `section.*` exists if the section does."""
    kinds: list[type[BaseModel]] = [PretrainConfig, FinetuneConfig]
    for part in key.split("."):
        if part == "*":
            return bool(kinds)
        fields = [kind.model_fields[part] for kind in kinds if part in kind.model_fields]
        if not fields:
            return False
        kinds = [section for field in fields for section in sections(field.annotation)]
    return True


SECTIONS = sorted(
    {
        name
        for kind in (PretrainConfig, FinetuneConfig)
        for name, field in kind.model_fields.items()
        if sections(field.annotation)
    }
)
FILES = r"py|json|jsonl|yaml|safetensors|png|pth|md|tar|out|txt"
MM = "backbone|test_cfg|decode_head|neck|data_preprocessor|roi_head"  # model.* keys of mmdet's and mmseg's configs
KEY = re.compile(
    rf"(?<![\w./-])({'|'.join(SECTIONS)})\.(?!(?:{FILES})\b|(?:{MM})\b)(\*|[a-z_]\w*)(?:\.[a-z_]\w*)?(?!\w|\.py)"
)


def keys_in(text: str) -> set[str]:
    """Dotted configuration keys in a text; imports and code are skipped because `data` is also a module."""
    text = re.sub(r"(?:-m|import|from) \S+", "", text)
    text = re.sub(r"```(?:python|diff).*?```", "", text, flags=re.DOTALL)
    return {found[0] for found in KEY.finditer(text)}


@for_each([path for path in [*PAGES, *RECIPES] if path.name != "CHANGELOG.md"])
def test_configuration_keys_exist(path: Path):
    text = path.read_text()
    if path.suffix == ".yaml":
        text = "\n".join(line for line in text.splitlines() if "#" in line)
    unknown = [key for key in keys_in(text) if not exists(key) and "hole_size" not in key]
    assert not unknown, f"no such key: {', '.join(sorted(unknown))}"


def test_key_finder():
    assert keys_in("give `train.epochs=3` and data.crop, not model.safetensors nor `python -m data.pack`") == {
        "train.epochs",
        "data.crop",
    }
    assert exists("method.window_size")
    assert exists("target.sha256")
    assert exists("augment.*")
    assert not exists("method.windows")
    assert not exists("data.size")


def test_changelog_renames_lead_to_existing_keys():
    rows = re.findall(r"^\| `([^|]+)` \| `([^|]+)` \|", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert len(rows) > 30
    for old, new in rows:
        for key in keys_in(new):
            assert exists(key), f"{old} -> {new}: no such key"
        if "=" not in old:
            assert not exists(old), f"{old} -> {new}: the old key exists"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1000
