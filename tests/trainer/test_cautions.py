"""A run says at its beginning where its settings train next to nothing."""

import re

import pytest

from downstream.classify.config import load as load_finetune
from pretrain.config import RECIPES, load
from pretrain.trainer.cautions import cautions


def said(*overrides: str, recipe: str = "mae_vitb16_224_1600e", samples: int = 1_281_167) -> str:
    config = load(recipe, ["data.shards=/nowhere", *overrides])
    return "\n".join(cautions(config, samples, samples // config.train.global_batch_size))


def test_a_rate_that_a_small_batch_makes_tiny_is_said_with_what_to_set():
    text = said("train.global_batch_size=16")
    assert text.startswith("the learning rate is only 9.4e-06: optim.base_lr=0.00015 is for a batch of 256 and scales")
    wanted = re.search(r"or (optim\.base_lr=\S+) for square-root scaling", text)
    assert wanted is not None
    assert said("train.global_batch_size=16", wanted[1]) == ""


def test_few_steps_an_epoch_are_said_with_a_batch_that_has_more():
    text = said(samples=5000)
    assert (
        "5000 samples in batches of 4096 make only 1 steps per epoch, 1600 in all, and each epoch leaves out 904"
        in text
    )
    wanted = re.search(r"train\.global_batch_size=\d+", text)
    assert wanted is not None
    assert said(wanted[0], "optim.base_lr=1e-3", samples=5000) == ""


@pytest.mark.parametrize("samples", [1, 7, 16, 40])
def test_next_to_no_samples_are_said_too(samples: int):
    assert (
        f"{samples} samples in batches of 1 make only" in said("train.global_batch_size=1", samples=samples)
        or samples > 7
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml") if "beit" not in path.stem))
def test_shipped_recipes_give_no_reason(name: str):
    samples = {"quickstart": 351}.get(name, 5000 if name.endswith("_small") else 1_281_167)
    assert said(recipe=name, samples=samples) == ""


def test_fine_tuning_of_one_image_a_step_is_said():
    config = load_finetune(
        "finetune_small_vits16_224_100e", ["data.shards=x", "val.shards=x", "train.global_batch_size=1"]
    )
    assert [text.split(":")[0] for text in cautions(config, 5000, 5000)] == ["the learning rate is only 2e-06"]
