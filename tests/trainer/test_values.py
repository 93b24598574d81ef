"""Values are converted to the type of their key, on the command line as in a recipe."""

from pathlib import Path
from typing import Any, Literal

import pytest

from pretrain.trainer.config import RunConfig
from pretrain.trainer.recipe import load_config
from pretrain.trainer.schema import Section
from pretrain.trainer.values import Word, convert, read_yaml

TEXTS = ["001", "010", "1_000", "12:30", "2024-05-01", "1e3", "0x1f", "on", "yes", "null", "None", "~", "1.50", "true"]
ON_THE_COMMAND_LINE = [
    "*x",
    "!x",
    "%x",
    "@x",
    "a#b",
    "a: b",
    "'x'",
    '"x"',
    "{a",
    "[ab]*",
    "/x/{000..010}.tar",
    "a=b",
    " x",
]


class Inner(Section):
    text: str = ""
    maybe: str | None = "x"
    lines: tuple[str, ...] = ()
    steps: tuple[float, ...] = (1.0,)
    number: float = 0
    count: int = 0
    flag: bool = False
    size: int | tuple[int, int] = 0
    shares: tuple[float, float] = (0, 0)
    choice: Literal["on", "off", "1"] = "off"
    side: Literal[3, 5] = 3
    optional: int | None = 0


class Outer(Section):
    inner: Inner = Inner()


def given(tmp_path: Path, key: str, typed: str) -> Any:
    """The value of a key set on the command line."""
    (tmp_path / "recipe.yaml").write_text("inner: {}\n")
    config = load_config(Outer, str(tmp_path / "recipe.yaml"), [f"inner.{key}={typed}"], tmp_path)
    return getattr(config.inner, key)


def written(tmp_path: Path, key: str, typed: str) -> Any:
    """The value of a key set in a recipe."""
    (tmp_path / "recipe.yaml").write_text(f"inner:\n  {key}: {typed}\n")
    return getattr(load_config(Outer, str(tmp_path / "recipe.yaml"), [], tmp_path).inner, key)


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_kept_as_typed(text: str, tmp_path: Path):
    assert given(tmp_path, "text", text) == written(tmp_path, "text", text) == text
    assert written(tmp_path, "lines", f"[{text}, 007]") == given(tmp_path, "lines", f"[{text}, 007]") == (text, "007")


@pytest.mark.parametrize("text", ON_THE_COMMAND_LINE)
def test_yaml_special_characters_are_kept_as_typed(text: str, tmp_path: Path):
    assert given(tmp_path, "text", text) == given(tmp_path, "maybe", text) == text
    quoted = "'" + text.replace("'", "''") + "'"
    assert written(tmp_path, "text", quoted) == text


@pytest.mark.parametrize(
    ("key", "typed", "value"),
    [
        ("number", "1e-3", 1e-3),
        ("number", "1.0e-3", 1e-3),
        ("number", ".5", 0.5),
        ("number", "3", 3.0),
        ("count", "1_000", 1000),
        ("count", "010", 10),
        ("count", "1e3", 1000),
        ("count", "0x10", 16),
        ("count", "+3", 3),
        ("flag", "True", True),
        ("flag", "yes", True),
        ("flag", "on", True),
        ("flag", "OFF", False),
        ("flag", "0", False),
        ("size", "224", 224),
        ("size", "[224, 160]", (224, 160)),
        ("size", "[224,160]", (224, 160)),
        ("size", "(224, 160)", (224, 160)),
        ("size", "224,160", (224, 160)),
        ("shares", "[0.9, 1e-3]", (0.9, 1e-3)),
        ("steps", "700", (700.0,)),
        ("steps", "7e2, 750", (700.0, 750.0)),
        ("steps", "[]", ()),
        ("choice", "on", "on"),
        ("choice", "Off", "off"),
        ("choice", "1", "1"),
        ("side", "5", 5),
        ("optional", "none", None),
        ("optional", "None", None),
        ("optional", "null", None),
        ("optional", "", None),
        ("optional", "7", 7),
        ("maybe", "None", None),
        ("maybe", "", None),
        ("text", "", ""),
    ],
)
def test_common_spellings_of_numbers_flags_lists_and_none(key: str, typed: str, value: Any, tmp_path: Path):
    for read in (given, written):
        read_back = read(tmp_path, key, typed)
        assert read_back == value
        assert type(read_back) is type(value)


def test_quoted_number_in_a_recipe_is_a_number(tmp_path: Path):
    assert written(tmp_path, "count", '"100"') == 100
    assert written(tmp_path, "number", "'1e-3'") == 1e-3


def test_names_that_look_like_numbers_stay_text(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: 0012\ndata: {shards: 2024-05-01}\n")
    config = load_config(RunConfig, str(recipe), [], tmp_path)
    assert (config.name, config.data.shards) == ("0012", "2024-05-01")
    for name in ("007", "12e45", "1.50", "2024"):  # a commit hash may look like a number
        assert load_config(RunConfig, str(recipe), [f"name={name}", f"data.shards={name}"], tmp_path).name == name


def test_duplicate_key_is_rejected(tmp_path: Path):
    with pytest.raises(ValueError, match=r"recipe\.yaml is not YAML: duplicate key count"):
        written(tmp_path, "count", "1\n  count: 2")


def test_value_that_needs_quotes_is_rejected_with_advice(tmp_path: Path):
    for text in ("%x", "@x", "{000..010}.tar", "!x"):
        with pytest.raises(ValueError, match="a value with special characters needs quotes"):
            written(tmp_path, "text", text)


def test_types_are_guessed_without_a_schema():
    raw = read_yaml("{a: 1e-3, b: [true, x], c: null, d: '1'}")
    assert convert(raw, Any) == {"a": 1e-3, "b": [True, "x"], "c": None, "d": "1"}
    assert isinstance(raw["a"], Word)


def test_overrides_nest_and_the_last_one_wins(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("inner: {count: 1}\n")
    overrides = ["inner={count: 2, number: 3}", "inner.number=1", "inner.number=2"]
    inner = load_config(Outer, str(tmp_path / "recipe.yaml"), overrides, tmp_path).inner
    assert (inner.count, inner.number) == (2, 2)
