"""Classifiers without an engine: what is loaded, what learns and how fast, what is random, what is refused."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from originals import TINY, randomized
from safetensors.torch import load_file, save_file
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy

from downstream.classify.build import check_classes, check_labels, check_pairs
from downstream.classify.config import RECIPES, FinetuneConfig, load
from downstream.classify.evaluate import load_classifier
from downstream.classify.finish import save_classifier
from downstream.classify.model import Classifier, build_classifier, build_vit
from downstream.classify.optim import build_optimizer, layer_decay_groups
from downstream.weights import features
from pretrain.launch import World
from pretrain.loop import seed_step
from pretrain.models.vit import ViT

SIZE = (8, 12)
DEPTH = TINY.depth


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Steps this small lose by more, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def configure(tmp_path: Path, **sections: Any) -> FinetuneConfig:
    """A tiny classifier of five classes from scratch; keys of sections with `__` for the dot."""
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in sections.items()]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: tiny\nmodel: {arch: vit_tiny, patch: 4}\ndata: {shards: a, size: [8, 12]}\nval: {shards: b}\n"
        "head: {classes: 5}\noptim: {warmup_epochs: 0}\ntrain: {epochs: 1, batch: 8, precision: fp32}\n"
    )
    return load(str(recipe), overrides)


POSITIONS = ["relative", "sincos", "bias"]


def small_encoder(position: str) -> ViT:
    return ViT("vit_tiny", 4, (2, 3), position == "relative", bias=position == "bias")


def encoder_file(folder: Path, position: str = "relative") -> Path:
    torch.manual_seed(3)
    encoder = small_encoder(position)
    randomized(encoder)
    state = encoder.state_dict()
    metadata = {"arch": "vit_tiny", "patch": "4", "size": "8x12", "position": position}
    save_file(state, folder / "encoder.safetensors", metadata)
    return folder / "encoder.safetensors"


def batch(count: int = 8, seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, *SIZE, 3), generator=generator, dtype=torch.uint8)
    return images, {"label": torch.randint(0, 5, (count,), generator=generator)}


def standardised(images: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((images / 255 - mean) / std).permute(0, 3, 1, 2)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("frozen", [True, False])
@torch.no_grad()
def test_all_of_the_encoder_is_in_the_classifier(position: str, frozen: bool, tmp_path: Path):
    """Its features, seen through timm's model; fine-tuning norms the pool anew, a frozen encoder keeps its norm."""
    path = encoder_file(tmp_path, position)
    config = configure(
        tmp_path,
        start__checkpoint=path,
        model__position=position,
        **({"start__trained_blocks": 0} if frozen else {}),
    )
    classifier, report = build_classifier(config)
    assert str(path) in report
    encoder = small_encoder(position)
    state = load_file(path)
    encoder.load_state_dict(state)
    if not frozen:
        encoder.norm = torch.nn.Identity()
    images, _ = batch()
    tokens = features(encoder.eval(), standardised(images))
    vit = classifier.vit.eval()
    torch.testing.assert_close(vit.forward_features(standardised(images)), tokens, rtol=1e-5, atol=1e-5)
    pooled = tokens[:, 1:].mean(1)
    if not frozen:
        pooled = F.layer_norm(pooled, pooled.shape[1:], eps=1e-6)
    expected = F.linear(pooled, vit.head.weight, vit.head.bias)
    torch.testing.assert_close(classifier(images)["logits"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(("pool", "trained"), [("avg", None), ("token", None), ("avg", 1), ("avg", 0)])
def test_every_trained_parameter_is_in_one_group_at_the_right_rate(
    position: str, pool: str, trained: int | None, tmp_path: Path
):
    keys: dict[str, Any] = {"model__position": position, "head__pool": pool}
    if trained is not None:
        path = encoder_file(tmp_path, position)
        keys |= {"start__checkpoint": path, "start__trained_blocks": trained}
    vit = build_classifier(configure(tmp_path, **keys))[0].vit
    groups = layer_decay_groups(vit, 0.05, 0.5)
    found = [(id(p), group) for group in groups for p in group["params"]]
    assert len(found) == len(dict(found)) == sum(p.requires_grad for p in vit.parameters())
    for name, parameter in vit.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in dict(found), name
            continue
        group = dict(found)[id(parameter)]
        above = 0
        if name.startswith("blocks."):
            above = DEPTH - int(name.split(".")[1])
        elif re.match("patch_embed|cls_token|pos_embed", name):
            above = DEPTH + 1
        elif name.startswith("norm."):
            above = 1
        assert group["lr_scale"] == 0.5**above, name
        decays = parameter.ndim > 1 and name not in ("cls_token", "pos_embed") and "rpe_bias" not in name
        assert group["weight_decay"] == (0.05 if decays else 0.0), name


MIXED = {"augment__mixup": 0.8, "augment__cutmix": 1.0, "augment__smoothing": 0.1}
RANDOM = {
    "drop path": {"head__drop_path": 0.5},
    "mixup": {"augment__mixup": 0.8},
    "cutmix": {"augment__cutmix": 1.0},
    "erasing": {"augment__erasing": 1.0},
    "all": {**MIXED, "augment__erasing": 0.5, "head__drop_path": 0.5},
}


def lively(config: FinetuneConfig) -> Classifier:
    """With a head that is not nearly nothing."""
    classifier, _ = build_classifier(config)
    torch.nn.init.normal_(classifier.vit.head.weight)
    return classifier


@pytest.mark.parametrize("part", RANDOM)
def test_what_is_random_depends_on_where_it_is_alone(part: str, tmp_path: Path):
    classifier = lively(configure(tmp_path, **RANDOM[part]))
    images, view = batch()

    def loss(*where: int) -> float:
        seed_step(*where)
        return classifier(images.clone(), view)["loss"].item()

    here = [loss(0, 3, part, rank) for part in (0, 1) for rank in (0, 1)]
    assert here == [loss(0, 3, part, rank) for part in (0, 1) for rank in (0, 1)]
    assert len({*here, *(loss(0, step, 0, 0) for step in range(4, 9))}) > 5
    assert not torch.equal(*(torch.rand(1) for _ in range(2)))
    classifier.eval()
    assert classifier(images)["logits"].equal(classifier(images)["logits"]), "evaluation draws nothing"


def test_mixed_losses_are_timms(tmp_path: Path):
    """Erasing before mixing, as timm's loader does; the soft targets' cross entropy."""
    classifier = lively(configure(tmp_path, **MIXED, augment__erasing=0.5))
    images, view = batch()
    for step in range(6):
        seed_step(step)
        ours = classifier(images, view)["loss"]
        seed_step(step)
        pixels = RandomErasing(0.5, mode="pixel", max_count=1, device="cpu")(standardised(images))
        mixup = Mixup(0.8, 1.0, prob=1.0, switch_prob=0.5, mode="batch", label_smoothing=0.1, num_classes=5)
        pixels, target = mixup(pixels, view["label"])
        torch.testing.assert_close(ours, SoftTargetCrossEntropy()(classifier.vit(pixels), target))


def test_plain_losses_are_smoothed_cross_entropy(tmp_path: Path):
    classifier = lively(configure(tmp_path, augment__smoothing=0.2))
    images, view = batch()
    soft = F.one_hot(view["label"], 5) * 0.8 + 0.2 / 5
    expected = -(soft * F.log_softmax(classifier.vit(standardised(images)), -1)).sum(-1).mean()
    torch.testing.assert_close(classifier(images, view)["loss"], expected)


@pytest.mark.parametrize("part", ["tuned", "probe"])
def test_a_few_images_are_learned_by_heart(part: str, tmp_path: Path):
    probe = {"start__trained_blocks": 0, "head__kind": "batchnorm"} if part == "probe" else {}
    config = configure(tmp_path, start__checkpoint=encoder_file(tmp_path), optim__base_lr=0.3, **probe)
    classifier, _ = build_classifier(config)
    optimizer = build_optimizer(classifier.vit, config, stage=0)
    images, view = batch(10)
    for _ in range(80):
        optimizer.zero_grad()
        classifier(images, view)["loss"].backward()
        optimizer.step()
    assert (classifier.eval()(images)["logits"].argmax(1) == view["label"]).all()


@torch.no_grad()
def test_a_probes_norm_is_folded_into_its_head(tmp_path: Path):
    path = encoder_file(tmp_path)
    config = configure(tmp_path, start__checkpoint=path, start__trained_blocks=0, head__kind="batchnorm")
    classifier, _ = build_classifier(config)
    for _ in range(3):
        classifier(*batch(seed=4))  # moves the running statistics
    classifier.eval()
    save_classifier(classifier.state_dict(), config, (), tmp_path / "model.safetensors")
    vit = build_vit("vit_tiny", 4, SIZE, "relative", 5, "avg", fc_norm=False).eval()
    vit.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    images, _ = batch(seed=5)
    torch.testing.assert_close(vit(standardised(images)), classifier(images)["logits"], rtol=1e-4, atol=1e-5)


def test_positions_are_resized_to_the_images(tmp_path: Path):
    path = encoder_file(tmp_path, "sincos")
    config = configure(tmp_path, start__checkpoint=path, model__position="sincos", data__size="[12,16]")
    classifier, report = build_classifier(config)
    assert classifier.vit.pos_embed.shape == (1, 1 + 3 * 4, TINY.dim)
    assert "2x3 -> 3x4 patches" in report


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
        ({"head__classes": 1}, "head.classes=1"),
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
    with pytest.raises(ValueError, match=r"ZeRO stage 1 cuts matrices in pieces: set train.ds_config=ds_configs/zero0"):
        build_optimizer(vit, config, stage=1)
    groups = build_optimizer(vit, config, stage=0).param_groups
    assert sorted(group["always_adapt"] for group in groups) == [False, True]


class Labelled(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.label)


@pytest.mark.parametrize(
    ("labels", "classes", "says"),
    [
        ([0, -1, 2], (), "1 of 3 samples in /shards have no label in 0..4 (head.classes=5): labels go from -1 to 2"),
        ([0, 5, 7], (), "2 of 3 samples in /shards have no label in 0..4 (head.classes=5): labels go from 0 to 7"),
        ([0, 1, 2], ("cat", "dog", "owl"), "the classes of /shards are 3 (cat, ...), but head.classes=5"),
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
    with pytest.raises(ValueError, match=r"each of 2 ranks has 3 at once \(train.batch=6"):
        check_pairs(config, World(0, 2, 0))
    check_pairs(configure(tmp_path, train__batch=6), World(0, 2, 0))


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_recipes_load_and_name_themselves(recipe: str):
    start = [] if recipe.startswith("scratch") else ["start.checkpoint=runs/x"]
    config = load(recipe, ["data.shards=a", "val.shards=b", *start])
    assert config.name == recipe
    comment = (RECIPES / f"{recipe}.yaml").read_text().split("name:")[0]
    command = "python -m downstream.classify.sweep" if recipe.startswith("transfer") else "downstream/classify/run.py"
    assert f"{command} {recipe} data.shards=" in comment
    assert f"batch {config.train.batch} = 8 GPUs" in comment
    parts = re.search(r"= 8 GPUs x (?:(\d+) accumulation x )?(\d+)", comment)
    assert parts
    assert int(parts[1] or 1) == config.train.accumulation
    assert 8 * int(parts[1] or 1) * int(parts[2]) == config.train.batch


def test_what_the_weights_depend_on_is_in_a_checkpoint(tmp_path: Path):
    before = configure(tmp_path).trained_function()
    for keys in (
        {"head__classes": 6},
        {"head__pool": "token"},
        {"augment__mixup": 0.5},
        {"optim__layer_decay": 0.5},
        {"average__momentum": 0.5},
        {"start__checkpoint": "x"},
    ):
        assert configure(tmp_path, **keys).trained_function() != before, keys
    assert configure(tmp_path, val__every=7, data__workers=0).trained_function() == before
