"""Typed sections of a recipe, marks for their keys, and the nearest valid name. No specific key is known here."""

import difflib
import re
from collections.abc import Iterator
from types import NoneType
from typing import Annotated, Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, Field

# Marks a key, as in `Annotated[int, MAY_CHANGE]`, whose value may change when a run continues: the weights do not
# depend on it. All other keys are compared then, so that a new one cannot be forgotten.
MAY_CHANGE = object()

# Marks a key that is newer than the first runs, which did what its default says: it is compared only if a run has, or
# had, another value.
DEFAULT_AS_BEFORE = object()

Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A frozen part of the configuration: unknown keys and wrong types are refused.

    Attributes:
        follows: sections that are reset when another section gets another `name`: {section: the other one}.
        hints: what to add to the error if the `name` of a section is unknown: {dotted key: text}.
    """

    follows: ClassVar[dict[str, str]] = {}
    hints: ClassVar[dict[str, str]] = {}

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    def resume_signature(self) -> dict[str, Any]:
        """The keys that are not marked `MAY_CHANGE`: a run continues only if they are equal."""
        signature, dumped = {}, self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            as_before = DEFAULT_AS_BEFORE in field.metadata and value == field.default
            if MAY_CHANGE not in field.metadata and not as_before:
                signature[name] = value.resume_signature() if isinstance(value, Section) else dumped[name]
        return signature


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The section types in an annotation; a union has several, told apart by their `name`."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [section for inner in get_args(annotation) for section in sections_in(inner)]


def choices(schema: type[BaseModel]) -> set[str]:
    """The sections that may have one of several types."""
    return {name for name, field in schema.model_fields.items() if len(sections_in(field.annotation)) > 1}


def of_name(sections: list[type[BaseModel]], name: Any) -> list[type[BaseModel]]:
    """The types of a section that have this `name`; all of them if none has."""
    named = [kind for kind in sections if len(sections) > 1 and name in get_args(kind.model_fields["name"].annotation)]
    return named or sections


def optional(annotation: Any) -> bool:
    """Whether the value may be none."""
    return NoneType in get_args(annotation)


def leaves(schema: type[BaseModel], raw: Any = None, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a schema; for a section of several types, those of the type that `raw` names, or of all."""
    for name, field in schema.model_fields.items():
        kinds, inner = sections_in(field.annotation), raw.get(name) if isinstance(raw, dict) else None
        if not kinds:
            yield prefix + name
        for kind in of_name(kinds, inner.get("name") if isinstance(inner, dict) else None):
            yield from leaves(kind, inner, f"{prefix}{name}.")


def nearest(name: str, names: list[str]) -> str:
    """'did you mean x?', or all valid names if none is close."""
    close = similar(name, names)
    return f"did you mean {' or '.join(close)}?" if close else f"valid: {', '.join(sorted(names))}"


def similar(name: str, names: list[str]) -> list[str]:
    """At most three names that were probably meant, none if none is close.

    `windows` gives `num_windows` rather than `window_size`, and `lomar_vitb16_400` gives `lomar_vitb16_224_400e`: a
    name that has every typed part, and the fewest others, comes before one with similar letters.
    """
    close = [known for known in names if _has_parts(known, name, "[a-z]?")]
    close = close or [known for known in names if _has_parts(known, name, ".*")]
    fewest = min((len(known.split("_")) for known in close), default=0)
    close = [known for known in close if len(known.split("_")) == fewest][:3]
    return close or difflib.get_close_matches(name, names, n=1, cutoff=0.6)


def _has_parts(known: str, typed: str, rest: str) -> bool:
    """Whether the typed parts are parts of the name, in this order, up to a `rest` of each, as in `400e`."""
    parts = iter(known.split("_"))
    return all(any(re.fullmatch(re.escape(given) + rest, part) for part in parts) for given in typed.split("_"))


def split_argument(argument: str, form: str) -> tuple[str, str]:
    """The key of an override and the text after it; `form` shows what one looks like, for the error.

    Raises:
        ValueError: an argument that is not `key=value`.
    """
    key, equals, text = argument.partition("=")
    if not equals or not key or key.startswith("-"):
        raise ValueError(f"{argument!r} is not an override: write {form}")
    return key, text
