"""Typed sections of a recipe, and how a YAML file and dotted overrides become one. Nothing here knows a key by name."""

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

RECIPES = Path(__file__).parent / "recipes"


class Section(BaseModel):
    """A frozen part of the configuration: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def nearest(name: str, names: list[str]) -> str:
    """', did you mean x?' or, with nothing near, the valid names."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"valid: {', '.join(sorted(names))}"


def read_recipe(name: str | Path) -> dict[str, Any]:
    """A recipe by path, or by the name of a shipped one; `extends: other.yaml` is merged under it.

    Raises:
        ValueError: no such recipe, or not a YAML mapping.
    """
    path = _find_recipe(name)
    try:
        recipe = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} holds no keys: a recipe is a YAML mapping of sections")
    base = recipe.pop("extends", None)
    return merge(read_recipe(path.parent / base), recipe) if base else recipe


def _find_recipe(name: str | Path) -> Path:
    for path in (Path(name), RECIPES / name, RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    shipped = sorted(p.stem for p in RECIPES.glob("*.yaml"))
    raise ValueError(f"no recipe {str(name)!r}: neither a file nor a shipped one; {nearest(Path(name).stem, shipped)}")


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries, `over` winning key by key."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """['optim.base_lr=1e-3', ...] -> {'optim': {'base_lr': ...}}; values are YAML.

    Raises:
        ValueError: an argument that is not `dotted.key=value`.
    """
    overrides: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key or key.startswith("-"):
            raise ValueError(f"{argument!r} is not an override: write section.key=value, for example train.epochs=100")
        nested: Any = yaml.safe_load(value)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        overrides = merge(overrides, nested)
    return overrides


def explain(error: ValidationError, schema: type[BaseModel]) -> str:
    """One line for each thing wrong, naming the dotted key and, for an unknown one, the nearest valid name."""
    lines = []
    for problem in error.errors(include_url=False):
        place = [str(part) for part in problem["loc"]]
        key = ".".join(place)
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown key {key}: {nearest(place[-1], list(_section_at(schema, place[:-1]).model_fields))}")
        elif problem["type"] == "value_error":
            lines.append(str(problem["ctx"]["error"]))
        elif problem["type"] == "missing":
            lines.append(f"{key} is not set: write it in the recipe or give {key}=value")
        else:
            lines.append(f"{key}={problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}")
    return "\n".join(lines)


def _section_at(schema: type[BaseModel], place: list[str]) -> type[BaseModel]:
    for part in place:
        inner = schema.model_fields[part].annotation
        assert isinstance(inner, type), "only sections have keys"
        assert issubclass(inner, BaseModel), "only sections have keys"
        schema = inner
    return schema
