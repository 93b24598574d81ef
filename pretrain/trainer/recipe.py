"""A recipe, what it extends and `section.key=value` overrides -> one checked configuration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pretrain.trainer.problems import COMMAND_LINE, Layer, explain
from pretrain.trainer.schema import Section, choices, nearest, sections_in, split_argument
from pretrain.trainer.values import Word, convert, read_bracketed, read_yaml

AnySection = TypeVar("AnySection", bound=Section)


def load_config(
    schema: type[AnySection],
    recipe: str,
    overrides: list[str],
    recipes: Path,
    elsewhere: Mapping[str, Path] | None = None,
) -> AnySection:
    """The configuration of a recipe (a path, or a name in the folder `recipes`) under `section.key=value` overrides.

    Args:
        elsewhere: other commands with the folders of their recipes, to name the command if one of those is given.

    Raises:
        ValueError: an unknown recipe or key, a wrong type, or values that do not fit together; one line each, which
            names the key to change.
    """
    layers = read_layers(schema, recipe, overrides, recipes, elsewhere)
    try:
        return schema.model_validate(convert(merge_layers(layers, schema), schema))
    except ValidationError as error:
        problems = _of_another_command(layers, schema, elsewhere or {}) or explain(error, schema, layers)
        raise ValueError("\n".join(problems)) from None


def read_layers(
    schema: type[BaseModel],
    recipe: str,
    overrides: list[str],
    recipes: Path,
    elsewhere: Mapping[str, Path] | None = None,
) -> list[Layer]:
    """The layers that set keys, later ones winning; raises ValueError as `load_config`."""
    typed = Layer(COMMAND_LINE, parse_overrides(overrides, schema))
    return [*_read_extended(_find_recipe(recipe, recipes, elsewhere or {}), recipes, schema, ()), typed]


def merge_layers(layers: list[Layer], schema: type[BaseModel]) -> dict[str, Any]:
    """All keys that are set, later layers winning."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge(merged, layer.keys, schema)
    return merged


def _read_extended(path: Path, shipped: Path, schema: type[BaseModel], above: tuple[Path, ...]) -> list[Layer]:
    if path.resolve() in above:
        raise ValueError(f"{path} extends itself: {' -> '.join(p.name for p in (*above, path))}")
    try:
        recipe = read_yaml(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}; a value with special characters needs quotes") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} is not a YAML mapping of sections")
    base, keys = recipe.pop("extends", None), _name_choices(recipe, schema)
    if base is None:
        return [Layer(path.name, keys)]
    sibling = path.parent / str(base)
    found = _find_recipe(sibling if sibling.is_file() else str(base), shipped, {})
    return [*_read_extended(found, shipped, schema, (*above, path.resolve())), Layer(path.name, keys)]


def _find_recipe(name: str | Path, shipped: Path, elsewhere: Mapping[str, Path]) -> Path:
    for path in (Path(name), shipped / name, shipped / f"{name}.yaml"):
        if path.is_file():
            return path
    for command, folder in elsewhere.items():
        if (folder / f"{Path(name).stem}.yaml").is_file():
            raise ValueError(f"{Path(name).stem} is a recipe for {command}: run that instead")
    names = sorted(p.stem for p in shipped.glob("*.yaml"))
    raise ValueError(
        f"no recipe {str(name)!r}: neither a file nor a shipped recipe (--recipes lists them); "
        f"{nearest(Path(name).stem, names)}"
    )


def _of_another_command(layers: list[Layer], schema: type[BaseModel], elsewhere: Mapping[str, Path]) -> list[str]:
    """One line if there are sections that belong to another command instead of this one."""
    unknown = {key: layer.source for layer in layers for key in layer.keys if key not in schema.model_fields}
    for command, folder in elsewhere.items() if unknown else ():
        theirs = {key for path in folder.glob("*.yaml") for key in read_yaml(path.read_text())}
        if found := sorted(unknown.keys() & theirs):
            (source, *_), keys = sorted({unknown[key] for key in found}), ", ".join(found)
            what = f"{keys} on the command line" if source == COMMAND_LINE else f"{source}, which has {keys},"
            return [f"{what} is for {command}: run that instead"]
    return []


def merge(base: dict[str, Any], over: dict[str, Any], schema: type[BaseModel] | None = None) -> dict[str, Any]:
    """Merges nested dictionaries, `over` winning key by key.

    A section of several types, told apart by `name`, is replaced as a whole if `over` names another type. A section
    that follows it (`Section.follows`) is dropped: another method has its own target, unless `over` sets one.
    """
    several = choices(schema) if schema is not None else set()
    merged = dict(base)
    for section, other in getattr(schema, "follows", {}).items():
        if _is_renamed(base.get(other), over.get(other)):
            merged.pop(section, None)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and not (key in several and _is_renamed(old, value)):
            value = merge(old, value)
        merged[key] = value
    return merged


def _is_renamed(old: Any, new: Any) -> bool:
    return isinstance(old, dict) and isinstance(new, dict) and new.get("name", old.get("name")) != old.get("name")


def parse_overrides(arguments: list[str], schema: type[BaseModel]) -> dict[str, Any]:
    """['optim.base_lr=1e-3', ...] -> {'optim': {'base_lr': Word('1e-3')}}; `convert` later applies the types.

    Raises:
        ValueError: an argument that is not `dotted.key=value`.
    """
    overrides: dict[str, Any] = {}
    for argument in arguments:
        key, text = split_argument(argument, "section.key=value, for example train.epochs=100")
        path = key.split(".")
        nested: Any = Word(text)
        field = schema.model_fields.get(path[0])
        if field is not None and len(path) == 1 and sections_in(field.annotation):
            nested = read_bracketed(text) or nested
        for part in reversed(path):
            nested = {part: nested}
        overrides = merge(overrides, _name_choices(nested, schema))
    return overrides


def _name_choices(keys: dict[str, Any], schema: type[BaseModel]) -> dict[str, Any]:
    """`method: mae` is short for `method: {name: mae}`."""
    short = {name: {"name": keys[name]} for name in choices(schema) if isinstance(keys.get(name), str) and keys[name]}
    return {**keys, **short}
