"""Typed sections of a recipe, and how a YAML file and dotted overrides become one. Nothing here knows a key by name."""

import difflib
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

RECIPES = Path(__file__).parent / "recipes"


class Section(BaseModel):
    """A frozen part of the configuration: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def nearest(name: str, names: list[str]) -> str:
    """', did you mean x?' or, with nothing near, the valid names."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"valid: {', '.join(sorted(names))}"


def read_recipe(name: str | Path, shipped: Path = RECIPES) -> dict[str, Any]:
    """A recipe by path, or by the name of one in the folder `shipped`, with what it `extends` merged under it.

    Raises:
        ValueError: no such recipe, not a YAML mapping, or recipes that extend each other in a circle.
    """
    return _read_extended(_find_recipe(name, shipped), shipped, ())


def _read_extended(path: Path, shipped: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in above:
        raise ValueError(f"{path} extends itself: {' -> '.join(p.name for p in (*above, path))}")
    try:
        recipe = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} holds no keys: a recipe is a YAML mapping of sections")
    base = recipe.pop("extends", None)
    if base is None:
        return recipe
    beside = path.parent / str(base)
    found = _find_recipe(beside if beside.is_file() else str(base), shipped)
    return merge(_read_extended(found, shipped, (*above, path.resolve())), recipe)


def _find_recipe(name: str | Path, shipped: Path) -> Path:
    for path in (Path(name), shipped / name, shipped / f"{name}.yaml"):
        if path.is_file():
            return path
    names = sorted(p.stem for p in shipped.glob("*.yaml"))
    raise ValueError(f"no recipe {str(name)!r}: neither a file nor a shipped one; {nearest(Path(name).stem, names)}")


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
        try:
            nested: Any = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"{argument!r}: {value!r} is not a YAML value; are brackets or quotes closed?") from None
        for part in reversed(key.split(".")):
            nested = {part: nested}
        overrides = merge(overrides, nested)
    return overrides


def explain(error: ValidationError, schema: type[BaseModel]) -> str:
    """One line for each thing wrong, naming the dotted key and, for an unknown one, the nearest valid name."""
    lines = []
    for problem in error.errors(include_url=False):
        section, place = _locate(problem["loc"], schema)
        key, kind = ".".join(place), problem["type"]
        if kind == "extra_forbidden":
            unknown = str(problem["loc"][-1])
            lines.append(f"unknown key {'.'.join([*place, unknown])}: {nearest(unknown, list(section.model_fields))}")
        elif kind == "value_error":
            lines.append(str(problem["ctx"]["error"]))
        elif kind == "missing" and len(place) == len(problem["loc"]):
            lines.append(f"{key} is not set: write it in the recipe or give {key}=value")
        else:
            said = "a value is missing" if kind == "missing" else problem["msg"][0].lower() + problem["msg"][1:]
            lines.append(f"{key}={problem['input']!r}: {said}")
    return "\n".join(lines)


def _locate(location: tuple[int | str, ...], schema: type[BaseModel]) -> tuple[type[BaseModel], list[str]]:
    """The section and the key of a problem; what follows the key is a list's position or one of several types."""
    place: list[str] = []
    for part in map(str, location):
        if part not in schema.model_fields:
            break
        place.append(part)
        annotation = schema.model_fields[part].annotation
        sections = [t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel)]
        if not sections:  # a section may be optional; there is never a choice of two
            break
        schema = sections[0]
    return schema, place
