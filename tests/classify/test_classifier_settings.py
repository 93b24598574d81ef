"""Tests of classifier settings: starting checkpoints, rejected settings, classes of the data and recipes."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.originals import SAME_TO_FP32, randomized
from helpers.ports import free_port
from helpers.tiny import everything_float64
from helpers.tiny_classifier import DEPTH, POSITIONS, batch, configure, encoder_file
from safetensors.torch import load_file

from data.image_folder import Folder
from data.labels import check_same_classes
from downstream.classify.checks import check_batches, check_train_and_val, with_classes_of_data
from downstream.classify.config import RECIPES, load
from downstream.classify.finetune import finetune
from downstream.classify.finish import save_classifier
from downstream.classify.model import build_classifier, check_start
from downstream.classify.optimizers import build_optimizer
from downstream.classify.trained_classifier import load_classifier
from pretrain.trainer.launch import World

NAMES = tuple("abcde")


def trained_run(tmp_path: Path, **keys: Any) -> Path:
    """Write the run folder of a classifier whose parameters are all random."""
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
def test_start_from_a_run_gives_the_same_logits(
    position: str, pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = trained_run(tmp_path, model__position=position, head__pool=pool)
    keys = {"model__position": position, "head__pool": pool, "start__checkpoint": run}
    classifier, report = build_classifier(configure(tmp_path, **keys), NAMES)
    trained = load_classifier(run, torch.device("cpu"))
    images, _ = batch()
    with everything_float64(monkeypatch):
        trained.model.double()
        logits = classifier.double().eval()(images)["logits"]
        # The class token's position is added to the token, which rounds it to fp32 once more.
        tolerance = SAME_TO_FP32 if position == "sincos" else 1e-10
        torch.testing.assert_close(logits, trained.predict(images), rtol=tolerance, atol=tolerance)
    assert "dropped" not in report

    larger, report = build_classifier(configure(tmp_path, **keys, data__image_size="[16,24]"), NAMES)
    own = larger.vit.fc_norm if pool == "avg" else larger.vit.norm
    before = trained.model.fc_norm if pool == "avg" else trained.model.norm
    assert own.weight.equal(before.weight.float())
    assert own.bias.equal(before.bias.float())
    assert larger.vit.head.weight.equal(trained.model.head.weight.float())
    assert ("resized" in report) == (position != "relative")


def test_head_is_new_if_the_classes_differ(tmp_path: Path):
    run = trained_run(tmp_path)
    config = configure(tmp_path, start__checkpoint=run)
    trained = load_file(run / "model.safetensors")
    for names in (tuple("abcdf"), ()):
        classifier, report = build_classifier(config, names)
        assert "a classifier of 5 classes" in report
        assert classifier.vit.head.weight.abs().max() < 1e-3
        assert classifier.vit.head.bias.abs().max() == 0
        assert classifier.vit.fc_norm.weight.equal(trained["fc_norm.weight"])
        assert "here applied to every token" not in report
    with pytest.raises(ValueError, match="a norm that was trained after average pooling"):
        build_classifier(configure(tmp_path, start__checkpoint=run, start__trained_blocks=1), NAMES)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model__position": "sincos"}, "is vit_tiny with relative positions; the encoder is vit_tiny with sincos"),
        ({"model__arch": "vit_small"}, "is vit_tiny with relative positions; the encoder is vit_small"),
        ({"model__arch": "vit_small", "model__position": "bias"}, "; set model.arch=vit_tiny model.position=relative"),
        ({"model__patch_size": 2}, "has patches of 4 pixels, the encoder of 2"),
        ({"model__patch_size": 2}, "only 14 and 16 can be converted; set model.patch_size=4"),
        ({"start__trained_blocks": 9}, f"start.trained_blocks=9: the encoder has {DEPTH} blocks"),
        ({"start__weights": "ema"}, "holds the online weights, not the ema ones"),
        ({"start__checkpoint": "/nowhere"}, "start.checkpoint: no checkpoint /nowhere"),
    ],
)
def test_checkpoint_that_does_not_fit_is_rejected(keys: dict[str, Any], message: str, tmp_path: Path):
    config = configure(tmp_path, **({"start__checkpoint": encoder_file(tmp_path)} | keys))
    with pytest.raises(ValueError, match=re.escape(message)):
        build_classifier(config)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_start(config)


def test_starting_checkpoint_is_checked_before_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The checkpoint is reported although the data does not exist either."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    config = configure(tmp_path, start__checkpoint=encoder_file(tmp_path), model__patch_size=2)
    with pytest.raises(ValueError, match="has patches of 4 pixels, the encoder of 2"):
        finetune(config, World(0, 1, 0))
    check_start(configure(tmp_path, start__checkpoint=encoder_file(tmp_path), data__image_size="[16,24]"))
    with pytest.raises(ValueError, match=r"data\.shards: .*a: no such shard"):
        finetune(configure(tmp_path, start__checkpoint=encoder_file(tmp_path)), World(0, 1, 0))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"start__trained_blocks": 0}, "start.trained_blocks=0 would freeze random weights"),
        ({"head__kind": "batchnorm"}, "head.kind=batchnorm is for linear probes"),
        ({"optim__name": "lars"}, "optim.name=lars is for linear probes"),
        ({"augment__randaugment": "rand-q9"}, "augment.randaugment: rand_augment 'rand-q9'"),
        ({"augment__mixupp": 1}, "unknown key augment.mixupp: did you mean augment.mixup?"),
        ({"head__num_classes": 1}, "head.num_classes=1"),
        (
            {"model__position": "learned"},
            "model.position=learned: must be relative, sincos or bias (sincos: any absolute table, fixed like MAE's or "
            "learned;",
        ),
        ({"val__shards": ""}, "val.shards='': must be non-empty"),
    ],
)
def test_error_for_an_invalid_configuration_names_the_key(keys: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=re.escape(message)):
        configure(tmp_path, **keys)


def test_lars_is_rejected_if_zero_partitions_matrices(tmp_path: Path):
    keys = {"start__trained_blocks": 0, "optim__name": "lars", "optim__weight_decay": 0}
    config = configure(tmp_path, start__checkpoint=encoder_file(tmp_path), **keys)
    vit = build_classifier(config)[0].vit
    with pytest.raises(ValueError, match=r"ZeRO stage 1 partitions matrices: set train.ds_config=zero0"):
        build_optimizer(vit, config, stage=1)
    groups = build_optimizer(vit, config, stage=0).param_groups
    assert sorted(group["always_adapt"] for group in groups) == [False, True]


def shards(name: str, labels: list[int], classes: tuple[str, ...]) -> Any:
    keys = ["a", "b", "c"][: len(labels)]
    return Folder(root=Path(name), names=keys, keys=keys, label=np.array(labels, np.int32), classes=classes)


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (
            [0, -1, 2],
            (),
            "1 of 3 samples in /shards have no label in 0..4 (head.num_classes=5): labels range from -1 to 2 "
            "(-1: none), 'b' has -1",
        ),
        (
            [0, 5, 7],
            (),
            "2 of 3 samples in /shards have no label in 0..4 (head.num_classes=5): labels range from 0 to 7 "
            "(-1: none), 'b' has 5",
        ),
        ([0, 1, 2], ("cat", "dog", "owl"), "/shards has 3 classes (cat, ...), but head.num_classes=5 (by default"),
    ],
)
def test_labels_outside_the_classes_are_rejected(labels: list[int], classes: tuple[str, ...], message: str):
    bad, good = shards("/shards", labels, classes), shards("/good", [0, 4], ())
    for key, train, val in (("data.shards", bad, good), ("val.shards", good, bad)):
        with pytest.raises(ValueError, match=re.escape(f"{key}: {message}")):
            check_train_and_val(train, val, 5)


@pytest.mark.parametrize(
    ("labels", "classes", "expected"), [([0, 1, 1], ("cat", "dog", "owl"), 3), ([0, 3, 1], (), 4), ([0, 0, 0], (), 5)]
)
def test_number_of_classes_defaults_to_that_of_the_data(
    labels: list[int], classes: tuple[str, ...], expected: int, tmp_path: Path
):
    unset = configure(tmp_path, head__num_classes="null")
    train, val = shards("/train", labels, classes), shards("/val", [0, 4] if expected == 5 else [1, 0], ())
    found = with_classes_of_data(unset, train, val)
    assert found.head.num_classes == expected
    assert build_classifier(found)[0].vit.head.out_features == expected
    assert found.resume_signature() == configure(tmp_path, head__num_classes=expected).resume_signature()
    assert with_classes_of_data(configure(tmp_path), train, val).head.num_classes == 5, "what was given counts"


def test_unlabelled_or_one_class_data_is_rejected(tmp_path: Path):
    unset = configure(tmp_path, head__num_classes="null")
    with pytest.raises(ValueError, match=r"data\.shards: 1 of 2 samples in /train have no label, for example 'b'"):
        with_classes_of_data(unset, shards("/train", [0, -1], ()), shards("/val", [0, 1], ()))
    with pytest.raises(ValueError, match=r"data\.shards: /train has one class, but a classifier needs at least two"):
        with_classes_of_data(unset, shards("/train", [0, 0], ("cat",)), shards("/val", [0], ("cat",)))


def test_classes_without_training_images_are_logged(caplog: pytest.LogCaptureFixture):
    train = shards("/train", [0, 2], ("cat", "dog", "owl"))
    check_train_and_val(train, shards("/val", [1], ("cat", "dog", "owl")), 3)
    assert "1 of 3 classes have no image in data.shards and will never be predicted: dog" in caplog.text


def test_different_classes_of_train_and_val_are_rejected():
    train = shards("/train", [0, 1], ("cat", "dog"))
    with pytest.raises(
        ValueError, match=r"label 1 is 'dog' in data.shards \(/train\) and 'owl' in val.shards \(/val\)"
    ):
        check_train_and_val(train, shards("/val", [0, 1], ("cat", "owl")), 2)
    check_train_and_val(train, shards("/val", [0, 1], ("cat", "dog")), 2)
    check_train_and_val(train, shards("/val", [0, 1], ()), 2)
    check_same_classes(("cat", "dog", "owl"), "/train", ("cat", "dog"), "/val", "")  # one set may have fewer classes


def test_mixup_rejects_an_odd_micro_batch(tmp_path: Path):
    config = configure(tmp_path, augment__mixup=0.8, train__global_batch_size=6)
    check_batches(config, World(0, 1, 0), 6)
    with pytest.raises(ValueError, match=r"each of 2 ranks has batches of 3 \(train.global_batch_size=6"):
        check_batches(config, World(0, 2, 0), 6)
    check_batches(configure(tmp_path, train__global_batch_size=6), World(0, 2, 0), 6)
    with pytest.raises(ValueError, match=r"5 samples are fewer than one global batch of 6: lower train\.global_batch"):
        check_batches(config, World(0, 1, 0), 5)


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_recipe_loads_and_its_comment_matches_its_settings(recipe: str):
    start = [] if recipe.startswith("scratch") else ["start.checkpoint=runs/x"]
    config = load(recipe, ["data.shards=a", "val.shards=b", *start])
    assert config.name == recipe
    comment = (RECIPES / f"{recipe}.yaml").read_text().split("name:")[0]
    command = (
        "python -m downstream.classify.sweep" if recipe.startswith("transfer") else "downstream/classify/finetune.py"
    )
    assert f"{command} {recipe} data.shards=" in comment
    batch = config.train.global_batch_size
    parts = re.search(rf"batch {batch} = (\d) GPUs? x (?:(\d+) accumulation x )?(\d+)", comment)
    assert parts
    assert int(parts[1]) == (1 if re.search("_(own|small)_", recipe) else 8)
    assert int(parts[2] or 1) == config.train.gradient_accumulation_steps
    assert int(parts[1]) * int(parts[2] or 1) * int(parts[3]) == batch


def test_resume_signature_covers_settings_that_affect_the_weights(tmp_path: Path):
    before = configure(tmp_path).resume_signature()
    for keys in (
        {"head__num_classes": 6},
        {"head__pool": "token"},
        {"augment__mixup": 0.5},
        {"optim__layer_decay": 0.5},
        {"ema__decay": 0.5},
        {"start__checkpoint": "x"},
    ):
        assert configure(tmp_path, **keys).resume_signature() != before, keys
    assert configure(tmp_path, val__every_epochs=7, data__num_workers=0).resume_signature() == before


def test_advice_for_a_new_run_includes_the_finished_model(tmp_path: Path):
    config = configure(tmp_path, runs=tmp_path, name="first")
    assert config.new_run_advice == "start a new run with another name=", "it has no model yet"
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "model.safetensors").touch()
    assert f"start.checkpoint={tmp_path / 'first'} and another name=" in config.new_run_advice
