"""Converts what people type, in a recipe or after `key=`, to the types of the keys.

YAML alone would read `001` as 1, `12:30` as 750, `1e-3` as text and `on` as true. So words are kept as typed until the
key is known.
"""

import functools
import operator
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml

from pretrain.trainer.schema import of_name, sections_in

_NONE = ("", "none", "null", "~")
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Word(str):
    """A word without quotes, as typed: its type depends on its key."""


class _Loader(yaml.SafeLoader):
    """YAML whose words stay `Word`s, and which refuses duplicate keys."""

    def construct_text(self, node: yaml.ScalarNode) -> str:
        text = str(self.construct_scalar(node))
        return Word(text) if node.style is None else text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {twice}", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)
# Of YAML's implicit types, keep only `<<`, which merges mappings.
_Loader.yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}


def read_yaml(text: str) -> Any:
    """Dictionaries and lists of `Word`s, or of strings for what is in quotes; raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


def convert(value: Any, annotation: Any) -> Any:
    """Converts what was typed to an annotation's types; what does not fit is left for pydantic to refuse."""
    if isinstance(value, dict):
        fields: dict[str, Any] = {}
        for kind in of_name(sections_in(annotation), value.get("name")):
            fields |= kind.model_fields
        return {
            str(key): convert(item, fields[key].annotation if key in fields else Any) for key, item in value.items()
        }
    if isinstance(value, list):
        return [convert(item, _of_elements(annotation)) for item in value]
    return _read_word(value, annotation) if isinstance(value, Word) else value


def read_bracketed(text: str) -> Any:
    """Reads `[224, 160]`, `(224, 160)` or `{name: mae}` as `Word`s; None for other text or if it is not closed."""
    if not text.startswith(("[", "(", "{")):
        return None
    if text.startswith("(") and text.endswith(")"):
        text = f"[{text[1:-1]}]"
    try:
        return read_yaml(text)
    except yaml.YAMLError:
        return None


def _read_word(word: str, annotation: Any) -> Any:
    kinds, text = _kinds(annotation), str(word)
    choices = {str(choice).lower(): choice for choice in kinds if isinstance(choice, str | int)}
    if text.lower() in choices:
        return choices[text.lower()]
    if text.lower() in _NONE and (NoneType in kinds or (not text and str not in kinds)):
        return None
    if str in kinds:
        return text
    if (listed := read_bracketed(text)) is not None:
        return convert(listed, annotation)
    if bool in kinds and text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    if (int in kinds or float in kinds) and (number := read_number(text)) is not None:
        return number
    if list in kinds and ("," in text or _is_of_any_length(annotation)):
        return convert([Word(part.strip()) for part in text.split(",")], annotation)
    return text


def read_number(text: str) -> int | float | None:
    """`100`, `1_000`, `010` (ten), `0x10`, `1e-3`, `.5`; None if it is no number."""
    for kind in (int, lambda digits: int(digits, 0), float):
        try:
            return kind(text.removeprefix(".") if text in (".inf", ".nan") else text)
        except ValueError:
            pass
    return None


def _kinds(annotation: Any) -> set[Any]:
    """What a value may be: types, `list` for lists and tuples, and a Literal's words; for Any, all types but text."""
    if annotation is Any:
        return {int, float, bool, NoneType, list}
    if annotation is None or (isinstance(annotation, type) and get_origin(annotation) is None):
        return {annotation or NoneType}
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    if get_origin(annotation) in (list, tuple):
        return {list}
    return functools.reduce(operator.or_, map(_kinds, get_args(annotation)), set())


def _is_of_any_length(annotation: Any) -> bool:
    return get_origin(annotation) is list or Ellipsis in get_args(annotation)


def _of_elements(annotation: Any) -> Any:
    """The annotation of a list's elements."""
    if get_origin(annotation) in (list, tuple):
        inner = tuple(kind for kind in get_args(annotation) if kind is not Ellipsis)
        return functools.reduce(operator.or_, inner) if inner else Any
    found = [_of_elements(inner) for inner in get_args(annotation) if get_origin(inner) is not None]
    return next((kind for kind in found if kind is not Any), Any)
