"""What is wrong with a configuration, in plain words: one line per problem, with its key and where it was set."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pretrain.trainer.schema import Section, leaves, nearest, of_name, optional, sections_in, similar

_LIMITS = {
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "finite_number": "a finite number",
    "string_too_short": "non-empty",
}
_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


COMMAND_LINE = "the command line"


@dataclass(frozen=True)
class Layer:
    """Keys that were set together: by a recipe, by one that it extends, or on the command line."""

    source: str
    keys: dict[str, Any]


def explain(error: ValidationError, schema: type[BaseModel], layers: Sequence[Layer] = ()) -> list[str]:
    """One line for each problem, with the dotted key and, if that is unknown, the nearest valid name.

    Args:
        layers: what set the keys, the command line last; a line names the recipe that set its key.
    """
    problems: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        key, text = _explain(problem, schema)
        for line in text.splitlines():
            # A union refuses a value once for each of its types; one line covers all of them.
            problems.setdefault(key or line, line + _origins(line, key, layers))
    return list(problems.values())


def source_of(key: str, layers: Sequence[Layer]) -> str:
    """What has set a key; '' if nothing has."""
    for layer in reversed(layers):
        keys: Any = layer.keys
        parts = key.split(".")
        while parts and isinstance(keys, dict) and parts[0] in keys:
            keys = keys[parts.pop(0)]
        if not parts:
            return layer.source
    return ""


def _recipe_of(key: str, layers: Sequence[Layer]) -> str:
    """The recipe that has set a key; '' if it was the command line."""
    source = source_of(key, layers)
    return "" if source == COMMAND_LINE else source


def _origins(line: str, key: str, layers: Sequence[Layer]) -> str:
    """Which recipe has set the key, or those keys that a message names with their values."""
    if key:
        return f" (in {origin})" if (origin := _recipe_of(key, layers)) else ""
    keys = dict.fromkeys(re.findall(r"\b([a-z_]\w*\.\w+)=", line))
    sets = [f"{origin} sets {key}" for key in keys if (origin := _recipe_of(key, layers))]
    return f" ({', '.join(sets)})" if sets and len(keys) > 1 else ""


def _explain(problem: Any, schema: type[BaseModel]) -> tuple[str, str]:
    """The key, if there is one, and what is wrong with it."""
    section, path, annotation = locate(problem["loc"], schema)
    key, kind = ".".join(path), problem["type"]
    if kind == "extra_forbidden":
        unknown = ".".join([*path, str(problem["loc"][-1])])
        if owners := _owners(path, str(problem["loc"][-1]), schema):
            return unknown, f"unknown key {unknown}: it belongs to {' and '.join(owners)}"
        return unknown, f"unknown key {unknown}: {_nearest_key(unknown, section, schema)}"
    if kind == "value_error":
        return "", str(problem["ctx"]["error"])
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = problem["ctx"]["discriminator"].strip("'")
        names = [name.strip("' ") for name in problem["ctx"].get("expected_tags", "").split(",")]
        given = problem["ctx"].get("tag")
        if given is None:
            return "", f"{key}.{tag} is not set: set it in the recipe or give {key}.{tag}=value"
        hint = schema.hints.get(f"{key}.{tag}", "") if issubclass(schema, Section) else ""
        return f"{key}.{tag}", f"unknown {key}.{tag}={given}: {nearest(str(given), names)}{hint}"
    if kind == "missing" and not isinstance(problem["input"], list | tuple):
        return key, f"{key} is not set: set it in the recipe or give {_example(key, annotation)}"
    return key, f"{key}={_shown(problem)}: must be {_wanted(problem, section, path, annotation)}"


def _example(key: str, annotation: Any) -> str:
    kinds = sections_in(annotation)
    required = [name for kind in kinds[:1] for name, field in kind.model_fields.items() if field.is_required()]
    return " ".join(f"{key}.{name}=value" for name in required) if required else f"{key}={'value' if not kinds else ''}"


def _shown(problem: Any) -> str:
    """The value as it was typed, as far as that is known."""
    value = problem["input"]
    if isinstance(value, str) and value:
        return value
    return repr(value.model_dump() if isinstance(value, BaseModel) else value)


def _wanted(problem: Any, section: type[BaseModel], path: list[str], annotation: Any) -> str:
    kind = problem["type"]
    if kind in _LIMITS:
        return _limit(problem) + (", or none" if optional(annotation) else "")
    field = section.model_fields.get(path[-1]) if path else None
    if kind == "string_pattern_mismatch" and field is not None:
        return f"{field.description}"
    words = [word for word in _choices(annotation) if isinstance(word, str)]
    if words and isinstance(problem["input"], str) and similar(problem["input"], words):
        return f"{describe(annotation)}: {nearest(problem['input'], words)}"
    said = field.description or "" if field is not None and words else ""
    if re.search(rf"\b{re.escape(str(problem['input']))}\b", said):  # it gives the valid word for what was typed
        return f"{describe(annotation)} ({said})"
    return describe(annotation)


def _limit(problem: Any) -> str:
    numbers = {name: f"{value:g}" for name, value in problem.get("ctx", {}).items() if name != "error"}
    return _LIMITS[problem["type"]].format(**numbers)


def problem_words(problem: Any) -> str:
    """What is wrong with a value in a section of another library: `must be at least 0`."""
    kind = problem["type"]
    if kind in _LIMITS:
        return f"must be {_limit(problem)}"
    named = {"int": int, "float": float, "bool": bool, "string": str}.get(kind.split("_")[0])
    return f"must be {_TYPES[named]}" if named else str(problem["msg"])


def _choices(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for inner in get_args(annotation) for choice in _choices(inner)]


def describe(annotation: Any) -> str:
    """What a value may be, in words: `a whole number, or [a whole number, a whole number]`."""
    if kinds := sections_in(annotation):
        names = [name for kind in kinds[:1] for name in kind.model_fields][:2]
        what = f"a section with keys such as {' and '.join(names)}"
        return f"{what}, or none" if optional(annotation) else what
    if get_origin(annotation) is Literal:
        words = [str(choice) for choice in get_args(annotation)]
        return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]
    if get_origin(annotation) in (list, tuple):
        inner = [describe(kind) for kind in get_args(annotation) if kind is not Ellipsis]
        of_any_length = get_origin(annotation) is list or Ellipsis in get_args(annotation)
        return f"a list, each element {inner[0]}" if of_any_length else f"[{', '.join(inner)}]"
    if annotation in (None, NoneType):
        return "none"
    if isinstance(annotation, type):
        return _TYPES.get(annotation, annotation.__name__)
    inner = [describe(kind) for kind in get_args(annotation) if isinstance(kind, type) or get_args(kind)]
    return ", or ".join(dict.fromkeys(inner))


def _owners(above: list[str], name: str, schema: type[BaseModel]) -> list[str]:
    """Other choices of a section that have this key: ['method.name=lomar']."""
    field = schema.model_fields.get(above[0]) if len(above) == 1 else None
    kinds = sections_in(field.annotation) if field else []
    having = [kind for kind in kinds if len(kinds) > 1 and name in kind.model_fields]
    return [f"{above[0]}.name={get_args(kind.model_fields['name'].annotation)[0]}" for kind in having]


def _nearest_key(unknown: str, section: type[BaseModel], schema: type[BaseModel]) -> str:
    """The nearest key of the same section, or else the same or a similar name in any section."""
    *above, name = unknown.split(".")
    prefix = "".join(f"{part}." for part in above)
    here = list(section.model_fields)
    if close := similar(name, here):
        return f"did you mean {' or '.join(prefix + known for known in close)}?"
    by_name: dict[str, list[str]] = {}
    for key in dict.fromkeys(leaves(schema)):
        by_name.setdefault(key.rpartition(".")[2], []).append(key)
    if found := [key for known in similar(name, list(by_name)) for key in by_name[known]]:
        return f"did you mean {' or '.join(found[:3])}?"
    return nearest(name, here)


def locate(location: tuple[int | str, ...], schema: type[BaseModel]) -> tuple[type[BaseModel], list[str], Any]:
    """The section that has a problem's key, the key, and its annotation."""
    path: list[str] = []
    rest, annotation = list(location), None
    while rest and str(rest[0]) in schema.model_fields:
        path.append(str(rest.pop(0)))
        annotation = schema.model_fields[path[-1]].annotation
        sections = sections_in(annotation)
        if len(sections) > 1 and rest:  # one of several, told apart by its `name`, which pydantic puts into the path
            named = of_name(sections, str(rest[0]))
            sections, rest = (named, rest[1:]) if len(named) == 1 else ([], rest)
        if not sections:
            break
        if rest:
            schema = sections[0]
    return schema, path, annotation
