"""benchmarks/step.py: the naive implementation equals LoMaR, and the output has every variant and ratio."""

import json
import sys

import pytest
import torch

from benchmarks import step
from benchmarks.naive_lomar import NaiveLoMaR, assert_equal_steps, randomize_tables
from benchmarks.step import Case
from benchmarks.variants import NAMES, build, draw_batch, load_variant, trainee
from pretrain.config import RECIPES, load
from pretrain.methods.lomar import LoMaR
from pretrain.models import vit

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vit.ARCHS, "vit_tiny", vit.Arch(dim=24, depth=3, heads=2))


@pytest.mark.parametrize("size", [224, 448])
@pytest.mark.parametrize("bf16", [False, True])
def test_naive_lomar_gives_our_loss_and_gradients(size: int, bf16: bool):
    config = load_variant("lomar", "vit_tiny", size)
    ours = build(config, CPU)
    assert isinstance(ours, LoMaR)
    randomize_tables(ours)
    naive, batch = NaiveLoMaR.like(ours), draw_batch(ours, config, 2)
    assert_equal_steps(ours, naive, batch, bf16)
    with torch.no_grad():
        naive.encoder.blocks[0].attn.rpe_k.lookup_table_weight.neg_()
    with pytest.raises(AssertionError, match="differ"):
        assert_equal_steps(ours, naive, batch, bf16)


def test_variants_set_the_expected_keys():
    configs = {name: load_variant(name, "vit_base", 448) for name in NAMES}
    assert {name: getattr(config.method, "mask_token_block", None) for name, config in configs.items()} == {
        "lomar": 0, "late": 8, "pr": 0, "fast": 8, "mae": None,
    }  # fmt: skip
    assert {name for name, config in configs.items() if config.pr_mim} == {"pr", "fast"}
    assert {config.method.num_windows for name, config in configs.items() if name != "mae"} == {9}


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("lomar_fast_*.yaml")))
def test_fast_variant_matches_the_shipped_recipes(recipe: str):
    shipped = load(recipe, ["data.shards=none"])
    size = 384 if shipped.data.image_size == 378 else shipped.data.image_size
    timed = load_variant("fast", shipped.model.arch, size)
    for section in ("model", "method", "target", "pr_mim"):
        assert getattr(timed, section) == getattr(shipped, section), section
    assert timed.data.height_width == shipped.data.height_width


def test_there_is_a_fast_recipe_for_every_size():
    assert len(list(RECIPES.glob("lomar_fast_*.yaml"))) == 9


def test_counted_flops_have_the_expected_order():
    flops = {name: trainee(load_variant(name, "vit_tiny", 224), 1, CPU).forward_flops() for name in NAMES}
    assert flops["fast"] < flops["late"] < flops["pr"] < flops["lomar"]


def test_cases_cover_both_image_sizes():
    for quick in (False, True):
        assert [case.size for case in step.cases(quick)] == [224, 448]


def test_table_has_every_variant_and_json_every_ratio(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(step, "cases", lambda quick: [Case("vit_tiny", 224, 1, 2)])
    monkeypatch.setattr(sys, "argv", ["step.py", "--quick"])
    step.main()
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    for key in ("fast_over_mae", "fast_over_lomar", "late_over_lomar", "pr_over_lomar", "lomar_over_mae"):
        assert result[f"{key}_224"] > 0
    assert result["cases"][0]["arithmetic"]["fast_over_lomar_224"] > 1.5
    for name in NAMES.values():
        assert sum(line.startswith(f"{name}  ") for line in table) == 1, name


def test_checkout_without_the_module_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no models_mae.py: give a checkout of github.com/facebookresearch/mae"):
        step.trainees(Case("vit_tiny", 224, 1, 2), {"mae": tmp_path})
