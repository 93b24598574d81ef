"""Typed sections of a recipe, and how a YAML file and dotted overrides become one. No key is known by name here."""

import ast
import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

# Marks a key, by `Annotated[int, MAY_CHANGE]`, that a run may continue with another value of: the weights do not
# depend on it. All other keys are compared when a run continues, so that a new one cannot be forgotten.
MAY_CHANGE = object()


class Section(BaseModel):
    """A frozen part of the configuration: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    def resume_signature(self) -> dict[str, Any]:
        """Every key that is not marked `MAY_CHANGE`: a checkpoint continues only where they are equal."""
        signature, dumped = {}, self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            if MAY_CHANGE not in field.metadata:
                value = getattr(self, name)
                signature[name] = value.resume_signature() if isinstance(value, Section) else dumped[name]
        return signature


AnySection = TypeVar("AnySection", bound=Section)


def load_config(schema: type[AnySection], recipe: str, overrides: list[str], recipes: Path) -> AnySection:
    """The configuration of a recipe (a path, or a name in the folder `recipes`) under `section.key=value` overrides.

    Raises:
        ValueError: an unknown recipe or key, a wrong type, or values that do not fit together; the message names the
            key to change.
    """
    choices = {name for name, field in schema.model_fields.items() if len(_sections(field.annotation)) > 1}
    raw = merge(read_recipe(recipe, recipes, choices), parse_overrides(overrides, schema), choices)
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise ValueError(explain(error, schema)) from None


def nearest(name: str, names: list[str]) -> str:
    """'did you mean x?', or all valid names where none is close."""
    close = [
        known for known in names if name in known.split("_")
    ]  # `windows` is `num_windows` rather than `window_size`
    close = close or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"valid: {', '.join(sorted(names))}"


def read_recipe(name: str | Path, shipped: Path, choices: Collection[str] = ()) -> dict[str, Any]:
    """A recipe by path, or by the name of one in the folder `shipped`, with what it `extends` merged under it.

    Raises:
        ValueError: no such recipe, not a YAML mapping, or recipes that extend each other in a circle.
    """
    return _read_extended(_find_recipe(name, shipped), shipped, choices, ())


def _read_extended(path: Path, shipped: Path, choices: Collection[str], above: tuple[Path, ...]) -> dict[str, Any]:
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
    sibling = path.parent / str(base)
    found = _find_recipe(sibling if sibling.is_file() else str(base), shipped)
    return merge(_read_extended(found, shipped, choices, (*above, path.resolve())), recipe, choices)


def _find_recipe(name: str | Path, shipped: Path) -> Path:
    for path in (Path(name), shipped / name, shipped / f"{name}.yaml"):
        if path.is_file():
            return path
    names = sorted(p.stem for p in shipped.glob("*.yaml"))
    raise ValueError(f"no recipe {str(name)!r}: neither a file nor a shipped recipe; {nearest(Path(name).stem, names)}")


def merge(base: dict[str, Any], over: dict[str, Any], choices: Collection[str] = ()) -> dict[str, Any]:
    """Nested dictionaries, `over` winning key by key.

    A section in `choices` is one of several types, told apart by its `name`: where `over` names another type, it
    replaces the whole section.
    """
    merged = dict(base)
    for key, value in over.items():
        old = base.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            same_type = key not in choices or value.get("name", old.get("name")) == old.get("name")
            value = merge(old, value) if same_type else value
        merged[key] = value
    return merged


def parse_overrides(arguments: list[str], schema: type[BaseModel] | None = None) -> dict[str, Any]:
    """['optim.base_lr=1e-3', ...] -> {'optim': {'base_lr': 0.001}}; values as of `parse_value`.

    Args:
        schema: where it has a string (`name`), a number is kept as typed: `name=007` is '007'.

    Raises:
        ValueError: an argument that is not `dotted.key=value`.
    """
    overrides: dict[str, Any] = {}
    for argument in arguments:
        key, text, nested = split_override(argument, "section.key=value, for example train.epochs=100")
        if isinstance(nested, int | float) and schema is not None and _is_text(key, schema):
            nested = text
        for part in reversed(key.split(".")):
            nested = {part: nested}
        overrides = merge(overrides, nested)
    return overrides


def split_override(argument: str, form: str) -> tuple[str, str, Any]:
    """The key, the text after it, and the value that this is; `form` is what an override looks like, for the error.

    Raises:
        ValueError: an argument that is not `key=value`.
    """
    key, equals, text = argument.partition("=")
    if not equals or not key or key.startswith("-"):
        raise ValueError(f"{argument!r} is not an override: write {form}")
    try:
        return key, text, parse_value(text)
    except ValueError as error:
        raise ValueError(f"{argument!r}: {error}") from None


def parse_value(text: str) -> Any:
    """The value that is typed after `key=`: a literal of Python's, `(1333, 800)`, `1e-4` or `None`; else YAML.

    YAML reads these three as strings, and Python does not read `true`, `[random, simple]` or words without quotes.

    Raises:
        ValueError: neither of the two.
    """
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    else:
        if isinstance(value, str | int | float | list | tuple | dict | None):
            return value
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{text!r} is not a YAML value; are brackets or quotes closed?") from None


def _is_text(key: str, schema: type[BaseModel]) -> bool:
    section, path, rest = _locate(tuple(key.split(".")), schema)
    field = section.model_fields.get(path[-1]) if path and not rest else None
    return field is not None and (field.annotation is str or str in get_args(field.annotation))


def explain(error: ValidationError, schema: type[BaseModel]) -> str:
    """One line for each error, with the dotted key and, where that is unknown, the nearest valid name."""
    return "\n".join(_explain(problem, schema) for problem in error.errors(include_url=False))


def _explain(problem: Any, schema: type[BaseModel]) -> str:
    section, path, rest = _locate(problem["loc"], schema)
    key, kind = ".".join(path), problem["type"]
    if kind == "extra_forbidden":
        unknown = str(problem["loc"][-1])
        return f"unknown key {'.'.join([*path, unknown])}: {nearest(unknown, list(section.model_fields))}"
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = problem["ctx"]["discriminator"].strip("'")
        names = [name.strip("' ") for name in problem["ctx"].get("expected_tags", "").split(",")]
        given = problem["ctx"].get("tag")
        if given is None:
            return f"{key}.{tag} is not set: write it in the recipe or give {key}.{tag}=value"
        return f"unknown {key}.{tag}={given!r}: {nearest(str(given), names)}"
    if kind == "missing" and not rest:
        return f"{key} is not set: write it in the recipe or give {key}=value"
    message = "a value is missing" if kind == "missing" else problem["msg"][0].lower() + problem["msg"][1:]
    return f"{key}={problem['input']!r}: {message}"


def _locate(
    location: tuple[int | str, ...], schema: type[BaseModel]
) -> tuple[type[BaseModel], list[str], list[int | str]]:
    """The section and the key of a problem, and what follows the key: an index of a list, or one of several types."""
    path: list[str] = []
    rest = list(location)
    while rest and str(rest[0]) in schema.model_fields:
        part = str(rest.pop(0))
        path.append(part)
        sections = _sections(schema.model_fields[part].annotation)
        if len(sections) > 1 and rest:  # one of several, told apart by its `name`, which pydantic puts into the path
            tag = str(rest[0])
            sections = [kind for kind in sections if tag in get_args(kind.model_fields["name"].annotation)]
            rest = rest[1:] if sections else rest
        if not sections:
            break
        schema = sections[0]
    return schema, path, rest


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The section types in an annotation; a union has several."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [section for inner in get_args(annotation) for section in _sections(inner)]
