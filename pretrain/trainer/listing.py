"""Lists a command's recipes and keys, and shows a recipe's keys with what set them, in 120 columns."""

import inspect
import itertools
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from pretrain.trainer.problems import Layer, describe, source_of
from pretrain.trainer.recipe import read_layers
from pretrain.trainer.schema import Section, choices, nearest, optional, sections_in

WIDTH = 120
UNSET = "(must be set)"


@dataclass(frozen=True)
class Catalog:
    """The recipes and keys of a command that trains.

    Attributes:
        schema: its configuration.
        recipes: the folder of its shipped recipes.
        load: (recipe, overrides) -> the checked configuration.
        elsewhere: as in `load_config`.
        check: a further check of a configuration that is shown.
    """

    schema: type[Section]
    recipes: Path
    load: Callable[[str, list[str]], Any]
    elsewhere: Mapping[str, Path] | None = None
    check: Callable[[Any], None] | None = None

    def list_recipes(self) -> str:
        """Each shipped recipe with the first sentence of its comment."""
        heads = {path.stem: _head(path.read_text()) for path in sorted(self.recipes.glob("*.yaml"))}
        width = max(map(len, heads))
        return "\n".join(_columns(f"{name:{width}}  ", head) for name, head in heads.items())

    def list_keys(self, word: str) -> str:
        """Every key with its type, its default and what it does.

        Args:
            word: a section, a method or another `name` of a section, or a key with or without section; '': all keys.

        Raises:
            ValueError: nothing has this name.
        """
        lines: list[str] = []
        names: set[str] = set()
        if word.removesuffix(".name") in choices(self.schema):  # the key that tells the sections apart
            word = word.removesuffix(".name")
        for section, kind in _all_sections(self.schema):
            tag = _tag(kind) if section else None
            named = word in ("", section, tag)
            names |= {name for name in (section, tag) if name} | kind.model_fields.keys()
            own = [name for name, field in kind.model_fields.items() if not sections_in(field.annotation)]
            own = [name for name in own if not (tag and name == "name")]
            keys = [name for name in own if named or word in (f"{section}.{name}", name)]
            if keys:
                title = f"{section}.name={tag}" if tag else section or "top level"
                lines += ["", _columns(f"{title}: ", inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0])]
                lines += [_describe_key(section, name, kind) for name in keys]
        if not lines:
            raise ValueError(f"--keys {word}: nothing has this name; {nearest(word.rpartition('.')[2], sorted(names))}")
        return "\n".join(lines).strip("\n")

    def show(self, recipe: str, overrides: list[str]) -> str:
        """The configuration in YAML, each key with what sets it.

        Raises:
            ValueError: as `load`, except for required texts that are not set, and as `check`.
        """
        layers = read_layers(self.schema, recipe, overrides, self.recipes, self.elsewhere)
        unset = [f"{key}={UNSET}" for key in _unset_texts(self.schema, layers)]
        config = self.load(recipe, [*overrides, *unset])
        if self.check is not None:
            self.check(config)
        return "\n".join(_show(config.model_dump(mode="json"), layers))


def _unset_texts(schema: type[BaseModel], layers: list[Layer]) -> Iterator[str]:
    """Required texts that nothing has set, such as `data.shards`."""
    for section, field in schema.model_fields.items():
        kinds = sections_in(field.annotation)
        if len(kinds) == 1 and not optional(field.annotation):
            for name, inner in kinds[0].model_fields.items():
                if inner.is_required() and inner.annotation is str and not source_of(f"{section}.{name}", layers):
                    yield f"{section}.{name}"


def _show(keys: dict[str, Any], layers: list[Layer], above: str = "") -> Iterator[str]:
    indent = "  " * above.count(".")
    for name, value in keys.items():
        if isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from _show(value, layers, f"{above}{name}.")
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("...\n").strip()
            yield f"{f'{indent}{name}: {text}':50}  # {source_of(above + name, layers) or 'default'}"


def _head(text: str) -> str:
    """The first sentence of a recipe's comment."""
    comments = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    words = (line.removeprefix("#").strip() for line in comments)
    head = " ".join(itertools.takewhile(lambda line: not re.match(r"(deepspeed|python|make) ", line), words))
    return re.split(r"(?<!Fig)(?<!al)\.(?: (?=[A-Z])|$)", head)[0]


def _columns(start: str, text: str) -> str:
    width = min(shutil.get_terminal_size((WIDTH, 0)).columns, WIDTH)
    return textwrap.fill(start + text, width, subsequent_indent=" " * min(len(start), 60), drop_whitespace=True)


def _all_sections(schema: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """The schema of the top-level keys, and each type of each section."""
    yield "", schema
    for name, field in schema.model_fields.items():
        for kind in sections_in(field.annotation):
            yield name, kind


def _tag(kind: type[BaseModel]) -> str | None:
    """The `name` that selects this type of a section, if the section has several."""
    field = kind.model_fields.get("name")
    return str(field.default) if field is not None and describe(field.annotation) == field.default else None


def _describe_key(section: str, name: str, kind: type[BaseModel]) -> str:
    field = kind.model_fields[name]
    key = f"{section}.{name}" if section else name
    what = describe(field.annotation)
    if field.default is not PydanticUndefined:
        shown = list(field.default) if isinstance(field.default, tuple) else field.default
        what += f"; {'none' if shown is None else str(shown).lower() if isinstance(shown, bool) else shown}"
    else:
        what += "; must be set"
    text = f"({what})" if not field.description else f"{field.description} ({what})"
    return _columns(f"  {key:34}  ", text)
