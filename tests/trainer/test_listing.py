"""The options --recipes, --keys and --show of a command, at a width of 120 columns."""

import itertools
import re
import sys
from pathlib import Path

import pytest

from downstream.classify import config as classify
from downstream.classify.config import FinetuneConfig
from pretrain import config as pretrain
from pretrain.config import PretrainConfig
from pretrain.trainer import main as entry
from pretrain.trainer.engine import check_engine_file
from pretrain.trainer.listing import Catalog
from pretrain.trainer.schema import Section, leaves, sections_in

PRETRAIN = Catalog(PretrainConfig, pretrain.RECIPES, pretrain.load, pretrain.ELSEWHERE, check_engine_file)
FINETUNE = Catalog(FinetuneConfig, classify.RECIPES, classify.load, classify.ELSEWHERE)
BOTH = pytest.mark.parametrize("catalog", [PRETRAIN, FINETUNE], ids=["pretrain", "finetune"])


@BOTH
def test_every_recipe_is_listed_with_a_description(catalog: Catalog):
    lines = catalog.list_recipes().splitlines()
    heads = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if not line.startswith(" ")}
    assert heads.keys() == {path.stem for path in catalog.recipes.glob("*.yaml")}
    assert all(len(head) > 10 for head in heads.values())
    assert max(map(len, lines)) <= 120


@BOTH
def test_every_key_is_listed(catalog: Catalog):
    lines = catalog.list_keys("").splitlines()
    keys = {line.split()[0] for line in lines if re.match("  [a-z]", line)}
    tags = {key for key in leaves(catalog.schema) if key in ("method.name", "target.name")}
    assert keys == set(leaves(catalog.schema)) - tags
    assert max(map(len, lines)) <= 120


def described(section: type[Section], name: str) -> bool:
    return bool(section.model_fields[name].description) or name == "name"


@BOTH
def test_every_key_has_a_description(catalog: Catalog):
    sections, missing = [catalog.schema], []
    for section in sections:  # grows while it is iterated
        for name, field in section.model_fields.items():
            inner = sections_in(field.annotation)
            sections += inner
            if not inner and not described(section, name):
                missing.append(f"{section.__qualname__}.{name}")
    assert not missing


def test_show_checks_the_engine_file(tmp_path: Path):
    (tmp_path / "engine.json").write_text('{"zero_optimisation": {}}')
    with pytest.raises(ValueError, match="zero_optimisation, which DeepSpeed does not know"):
        PRETRAIN.show("quickstart", [f"train.ds_config={tmp_path / 'engine.json'}"])
    assert "ds_config: zero3" in PRETRAIN.show("quickstart", ["train.ds_config=zero3"])


@pytest.mark.parametrize(
    ("word", "keys"),
    [
        ("lut", ["lut.alpha", "lut.loss"]),
        ("mae", ["method.mask_type", "method.mask_ratio"]),
        ("throw_ratio", ["pr_mim.throw_ratio"]),
        ("optim.base_lr", ["optim.base_lr"]),
    ],
)
def test_list_keys_filters_by_name(word: str, keys: list[str]):
    listed = PRETRAIN.list_keys(word)
    assert all(key in listed for key in keys)
    assert "data.shards" not in listed


def test_method_name_lists_all_keys_of_the_methods():
    assert PRETRAIN.list_keys("method.name") == PRETRAIN.list_keys("method")


@pytest.mark.parametrize(
    ("catalog", "recipe", "command"),
    [
        (PRETRAIN, "finetune_in1k_vitb16_224_100e", "downstream/classify/finetune.py"),
        (FINETUNE, "mae_vits16_224_small", "pretrain/run.py"),
    ],
)
def test_recipe_of_another_command_names_that_command(catalog: Catalog, recipe: str, command: str):
    with pytest.raises(ValueError, match=f"{recipe} is a recipe for {command}: run that instead"):
        catalog.show(recipe, [])


def test_types_and_defaults_are_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")  # no line is wrapped
    assert re.search(r"optim\.betas .*\(\[a number, a number\]; \[0\.9, 0\.95\]\)", PRETRAIN.list_keys("optim"))
    assert re.search(r"data\.shards (?s:.){,200}must be set\)", PRETRAIN.list_keys("data"))


def test_unknown_word_suggests_the_nearest_name():
    with pytest.raises(ValueError, match=r"--keys lomra: nothing has this name; did you mean lomar\?"):
        PRETRAIN.list_keys("lomra")


def test_show_names_the_source_of_each_key(tmp_path: Path):
    shown = PRETRAIN.show("mae_vits16_224_1600e", ["train.epochs=50", "data.shards=007"])
    sources = {line.split(":")[0].strip(): line.split("# ")[1] for line in shown.splitlines() if "# " in line}
    assert (sources["arch"], sources["mask_ratio"]) == ("mae_vits16_224_1600e.yaml", "mae_vitb16_224_1600e.yaml")
    assert (sources["epochs"], sources["residual"]) == ("the command line", "default")
    (tmp_path / "shown.yaml").write_text(shown)
    assert pretrain.load(str(tmp_path / "shown.yaml"), []) == pretrain.load(
        "mae_vits16_224_1600e", ["train.epochs=50", "data.shards=007"]
    )


def test_recipe_without_data_is_shown():
    lines = FINETUNE.show("finetune_small_vits16_224_100e", []).splitlines()
    assert sum("shards: (must be set)" in line for line in lines) == 2


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--recipes"], "quickstart ", 0),
        (["--keys", "log"], "log.every_steps", 0),
        (["--show", "quickstart", "name=x"], "name: x", 0),
        (["--keys", "lomra"], "did you mean lomar?", 1),
    ],
)
def test_command_prints_the_listing_and_exits(
    arguments: list[str],
    message: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def end(given: int) -> None:
        raise SystemExit(given)

    monkeypatch.setattr(entry, "exit_process", end)
    monkeypatch.setattr(entry, "watch_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        entry.main("", pretrain.load, lambda config, world: pytest.fail("it trains"), catalog=PRETRAIN)
    assert ended.value.code == code
    assert message in "".join(itertools.chain(*capsys.readouterr()))
