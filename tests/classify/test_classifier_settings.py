"""Classifiers without an engine: what they start from, what is refused, the recipes."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.originals import randomized
from helpers.tiny_classifier import DEPTH, POSITIONS, batch, configure, encoder_file
from safetensors.torch import load_file

from downstream.classify.build import check_classes, check_labels, check_pairs
from downstream.classify.config import RECIPES, load
from downstream.classify.evaluate import load_classifier
from downstream.classify.finish import save_classifier
from downstream.classify.model import build_classifier
from downstream.classify.optimizers import build_optimizer
from pretrain.trainer.launch import World

NAMES = tuple("abcde")


def trained_run(tmp_path: Path, **keys: Any) -> Path:
    """The folder of a classifier's run, in which nothing is at a special value."""
    config = configure(tmp_path, **keys)
    classifier, _ = build_classifier(config, NAMES)
    randomized(classifier)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(config.to_yaml())
    save_classifier(classifier.state_dict(), config, NAMES, run / "model.safetensors")
    return run


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("pool", ["avg", "token"])
@torch.no_grad()
def test_a_classifier_goes_on_as_what_it_was(position: str, pool: str, tmp_path: Path):
    run = trained_run(tmp_path, model__position=position, head__pool=pool)
    keys = {"model__position": position, "head__pool": pool, "start__checkpoint": run}
    classifier, report = build_classifier(configure(tmp_path, **keys), NAMES)
    trained = load_classifier(run, torch.device("cpu"))
    images, _ = batch()
    torch.testing.assert_close(classifier.eval()(images)["logits"], trained.predict(images), rtol=1e-5, atol=1e-5)
    assert "dropped" not in report

    larger, report = build_classifier(configure(tmp_path, **keys, data__size="[16,24]"), NAMES)
    own = larger.vit.fc_norm if pool == "avg" else larger.vit.norm
    before = trained.model.fc_norm if pool == "avg" else trained.model.norm
    assert own.weight.equal(before.weight)
    assert own.bias.equal(before.bias)
    assert larger.vit.head.weight.equal(trained.model.head.weight)
    assert ("resized" in report) == (position != "relative")


def test_other_classes_get_a_new_head(tmp_path: Path):
    run = trained_run(tmp_path)
    config = configure(tmp_path, start__checkpoint=run)
    trained = load_file(run / "model.safetensors")
    for names in (tuple("abcdf"), ()):
        classifier, report = build_classifier(config, names)
        assert "a classifier of 5 classes" in report
        assert classifier.vit.head.weight.abs().max() < 1e-3
        assert classifier.vit.head.bias.abs().max() == 0
        assert classifier.vit.fc_norm.weight.equal(trained["fc_norm.weight"])
    with pytest.raises(ValueError, match="a norm that was trained behind an average pool"):
        build_classifier(configure(tmp_path, start__checkpoint=run, start__trained_blocks=1), NAMES)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"model__position": "sincos"}, "is vit_tiny with relative positions; the encoder is vit_tiny with sincos"),
        ({"model__arch": "vit_small"}, "is vit_tiny with relative positions; the encoder is vit_small"),
        ({"model__patch": 2}, "has patches of 4 pixels, the encoder of 2"),
        ({"start__trained_blocks": 9}, f"start.trained_blocks=9: there are {DEPTH} blocks"),
        ({"start__weights": "ema"}, "holds the online weights, not the ema ones"),
        ({"start__checkpoint": "/nowhere"}, "start.checkpoint: no checkpoint /nowhere"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(keys: dict[str, Any], says: str, tmp_path: Path):
    config = configure(tmp_path, **({"start__checkpoint": encoder_file(tmp_path)} | keys))
    with pytest.raises(ValueError, match=re.escape(says)):
        build_classifier(config)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"start__trained_blocks": 0}, "start.trained_blocks=0 leaves random weights as they are"),
        ({"head__kind": "batchnorm"}, "head.kind=batchnorm is a linear probe's"),
        ({"optim__name": "lars"}, "optim.name=lars is a linear probe's"),
        ({"augment__randaugment": "rand-q9"}, "augment.randaugment: rand_augment 'rand-q9'"),
        ({"augment__mixupp": 1}, "unknown key augment.mixupp: did you mean mixup?"),
        ({"head__classes": 1}, "head.num_classes=1"),
        ({"val__shards": ""}, "val.shards=None"),
    ],
)
def test_a_configuration_that_cannot_work_names_its_key(keys: dict[str, Any], says: str, tmp_path: Path):
    with pytest.raises(ValueError, match=re.escape(says)):
        configure(tmp_path, **keys)


def test_lars_is_refused_where_zero_cuts_its_matrices(tmp_path: Path):
    keys = {"start__trained_blocks": 0, "optim__name": "lars", "optim__weight_decay": 0}
    config = configure(tmp_path, start__checkpoint=encoder_file(tmp_path), **keys)
    vit = build_classifier(config)[0].vit
    with pytest.raises(ValueError, match=r"ZeRO stage 1 cuts matrices in pieces: set train.ds_config=zero0"):
        build_optimizer(vit, config, stage=1)
    groups = build_optimizer(vit, config, stage=0).param_groups
    assert sorted(group["always_adapt"] for group in groups) == [False, True]


class Labelled(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.label)


@pytest.mark.parametrize(
    ("labels", "classes", "says"),
    [
        (
            [0, -1, 2],
            (),
            "1 of 3 samples in /shards have no label in 0..4 (head.num_classes=5): labels go from -1 to 2",
        ),
        ([0, 5, 7], (), "2 of 3 samples in /shards have no label in 0..4 (head.num_classes=5): labels go from 0 to 7"),
        ([0, 1, 2], ("cat", "dog", "owl"), "the classes of /shards are 3 (cat, ...), but head.num_classes=5"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: list[int], classes: tuple[str, ...], says: str):
    index: Any = Labelled(label=np.array(labels), classes=classes, keys=["a", "b", "c"], root=Path("/shards"))
    with pytest.raises(ValueError, match=re.escape(f"val.shards: {says}")) as error:
        check_labels(index, 5, "val.shards")
    assert "'b' has" in str(error.value) or classes


def test_other_classes_under_the_same_labels_are_refused():
    train: Any = Labelled(classes=("cat", "dog", "owl"), root=Path("/train"))
    val: Any = Labelled(classes=("cat", "owl"), root=Path("/val"))
    with pytest.raises(
        ValueError, match=r"label 1 is 'dog' in data.shards \(/train\) and 'owl' in val.shards \(/val\)"
    ):
        check_classes(train, val)
    check_classes(train, Labelled(classes=("cat", "dog"), root=Path("/val")))
    check_classes(train, Labelled(classes=(), root=Path("/val")))


def test_an_odd_micro_batch_cannot_be_mixed(tmp_path: Path):
    config = configure(tmp_path, augment__mixup=0.8, train__batch=6)
    check_pairs(config, World(0, 1, 0))
    with pytest.raises(ValueError, match=r"each of 2 ranks has 3 at once \(train.global_batch_size=6"):
        check_pairs(config, World(0, 2, 0))
    check_pairs(configure(tmp_path, train__batch=6), World(0, 2, 0))


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_recipes_load_and_name_themselves(recipe: str):
    start = [] if recipe.startswith("scratch") else ["start.checkpoint=runs/x"]
    config = load(recipe, ["data.shards=a", "val.shards=b", *start])
    assert config.name == recipe
    comment = (RECIPES / f"{recipe}.yaml").read_text().split("name:")[0]
    command = (
        "python -m downstream.classify.sweep" if recipe.startswith("transfer") else "downstream/classify/finetune.py"
    )
    assert f"{command} {recipe} data.shards=" in comment
    assert f"batch {config.train.global_batch_size} = 8 GPUs" in comment
    parts = re.search(r"= 8 GPUs x (?:(\d+) accumulation x )?(\d+)", comment)
    assert parts
    assert int(parts[1] or 1) == config.train.gradient_accumulation_steps
    assert 8 * int(parts[1] or 1) * int(parts[2]) == config.train.global_batch_size


def test_what_the_weights_depend_on_is_in_a_checkpoint(tmp_path: Path):
    before = configure(tmp_path).resume_signature()
    for keys in (
        {"head__classes": 6},
        {"head__pool": "token"},
        {"augment__mixup": 0.5},
        {"optim__layer_decay": 0.5},
        {"average__momentum": 0.5},
        {"start__checkpoint": "x"},
    ):
        assert configure(tmp_path, **keys).resume_signature() != before, keys
    assert configure(tmp_path, val__every=7, data__workers=0).resume_signature() == before
