"""Tests of the classifier without a training engine: loaded weights, learning rates, losses and randomness."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.originals import TINY
from helpers.tiny import everything_float64
from helpers.tiny_classifier import DEPTH, POSITIONS, SIZE, batch, configure, encoder_file, small_encoder, standardized
from safetensors.torch import load_file
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy

from downstream.checkpoints.weights import features
from downstream.classify.config import FinetuneConfig
from downstream.classify.finish import save_classifier
from downstream.classify.model import Classifier, build_classifier, build_vit
from downstream.classify.optimizers import build_optimizer, layer_decay_groups
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.trainer.seed import seed_step

CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # in float64


@pytest.mark.parametrize(
    ("position", "registers"), [*((kind, 0) for kind in POSITIONS), ("relative", 2), ("sincos", 2)]
)
@pytest.mark.parametrize("frozen", [True, False])
@torch.no_grad()
def test_classifier_uses_the_complete_encoder(
    position: str, registers: int, frozen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """timm's model reproduces the encoder's features, with a new norm after pooling unless the encoder is frozen."""
    path = encoder_file(tmp_path, position, registers)
    config = configure(
        tmp_path,
        start__checkpoint=path,
        model__position=position,
        model__registers=registers,
        **({"start__trained_blocks": 0} if frozen else {}),
    )
    classifier, report = build_classifier(config)
    assert str(path) in report
    encoder = small_encoder(position, registers)
    encoder.load_state_dict(load_file(path))
    if not frozen:
        encoder.norm = torch.nn.Identity()
    images, _ = batch()
    with everything_float64(monkeypatch):
        tokens = features(encoder.double().eval(), standardized(images))
        vit = classifier.double().eval().vit
        torch.testing.assert_close(vit.forward_features(standardized(images)), tokens, **CLOSE)
        pooled = tokens[:, 1 + registers :].mean(1)
        if not frozen:
            pooled = F.layer_norm(pooled, pooled.shape[1:], eps=1e-6)
        expected = F.linear(pooled, vit.head.weight, vit.head.bias)
        torch.testing.assert_close(classifier(images)["logits"], expected, **CLOSE)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(("pool", "trained"), [("avg", None), ("token", None), ("avg", 1), ("avg", 0)])
def test_every_trained_parameter_is_in_one_group_with_the_right_rate(
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


MIXED = {"augment__mixup": 0.8, "augment__cutmix": 1.0, "augment__label_smoothing": 0.1}
RANDOM = {
    "drop path": {"model__drop_path_rate": 0.5},
    "mixup": {"augment__mixup": 0.8},
    "cutmix": {"augment__cutmix": 1.0},
    "erasing": {"augment__random_erasing": 1.0},
    "all": {**MIXED, "augment__random_erasing": 0.5, "model__drop_path_rate": 0.5},
}


def classifier_with_random_head(config: FinetuneConfig) -> Classifier:
    """Build a classifier whose head is not near zero."""
    classifier, _ = build_classifier(config)
    torch.nn.init.normal_(classifier.vit.head.weight)
    return classifier


@pytest.mark.parametrize("part", RANDOM)
def test_randomness_depends_only_on_seed_step_micro_batch_and_rank(part: str, tmp_path: Path):
    classifier = classifier_with_random_head(configure(tmp_path, **RANDOM[part]))
    images, labels = batch()

    def loss(*where: int) -> float:
        seed_step(*where)
        return classifier(images.clone(), labels)["loss"].item()

    here = [loss(0, 3, micro_batch, rank) for micro_batch in (0, 1) for rank in (0, 1)]
    assert here == [loss(0, 3, micro_batch, rank) for micro_batch in (0, 1) for rank in (0, 1)]
    assert len({*here, *(loss(0, step, 0, 0) for step in range(4, 9))}) > 5
    assert not torch.equal(*(torch.rand(1) for _ in range(2)))
    classifier.eval()
    assert classifier(images)["logits"].equal(classifier(images)["logits"]), "evaluation draws nothing"


def test_mixup_and_cutmix_losses_match_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Random erasing comes before mixing, as in timm's loader, and the loss is soft-target cross-entropy."""
    classifier = classifier_with_random_head(configure(tmp_path, **MIXED, augment__random_erasing=0.5))
    images, labels = batch()
    with everything_float64(monkeypatch):
        classifier.double()
        for step in range(6):
            seed_step(step)
            ours = classifier(images, labels)["loss"]
            seed_step(step)
            pixels = RandomErasing(0.5, mode="pixel", max_count=1, device="cpu")(standardized(images))
            mixup = Mixup(0.8, 1.0, prob=1.0, switch_prob=0.5, mode="batch", label_smoothing=0.1, num_classes=5)
            pixels, target = mixup(pixels, labels)
            torch.testing.assert_close(ours, SoftTargetCrossEntropy()(classifier.vit(pixels), target), **CLOSE)


def test_loss_without_mixing_is_label_smoothed_cross_entropy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    classifier = classifier_with_random_head(configure(tmp_path, augment__label_smoothing=0.2))
    images, labels = batch()
    with everything_float64(monkeypatch):
        classifier.double()
        soft = F.one_hot(labels, 5) * 0.8 + 0.2 / 5
        expected = -(soft * F.log_softmax(classifier.vit(standardized(images)), -1)).sum(-1).mean()
        torch.testing.assert_close(classifier(images, labels)["loss"], expected, **CLOSE)


@pytest.mark.parametrize("part", ["tuned", "probe", "lists"])
def test_training_memorizes_a_few_images(part: str, tmp_path: Path):
    probe = {"start__trained_blocks": 0, "head__kind": "batchnorm"} if part == "probe" else {}
    config = configure(tmp_path, start__checkpoint=encoder_file(tmp_path), optim__base_lr=0.3, **probe)
    classifier, _ = build_classifier(config)
    optimizer = build_optimizer(classifier.vit, config, stage=0)
    images, labels = batch(10)
    labels = multi_hot_labels(10) if part == "lists" else labels
    for _ in range(80):
        optimizer.zero_grad()
        classifier(images, labels)["loss"].backward()
        optimizer.step()
    logits = classifier.eval()(images)["logits"]
    assert ((logits > 0) == labels).all() if part == "lists" else (logits.argmax(1) == labels).all()


def multi_hot_labels(count: int = 8) -> torch.Tensor:
    """float32 (B, 5) multi-hot labels, including an image without classes and one with all of them."""
    labels = torch.rand(count, 5, generator=torch.Generator().manual_seed(6)).lt(0.4).float()
    labels[0], labels[1] = 0, 1
    return labels


def test_multi_label_loss_is_binary_cross_entropy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The expected loss is written out from the sigmoid of each logit, with labels smoothed towards 0.5."""
    classifier = classifier_with_random_head(configure(tmp_path, augment__label_smoothing=0.2))
    images, labels = batch()[0], multi_hot_labels()
    with everything_float64(monkeypatch):
        classifier.double()
        probability = torch.sigmoid(classifier.vit(standardized(images)))
        target = labels.double() * 0.8 + 0.1
        expected = -(target * probability.log() + (1 - target) * (1 - probability).log()).mean()
        torch.testing.assert_close(classifier(images, labels.double())["loss"], expected, **CLOSE)


def test_multi_label_targets_are_mixed_in_the_same_ratio_as_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a batch of black and white images, the brightness of each shows the ratio in which it was mixed."""
    keys = {**MIXED, "augment__label_smoothing": 0.0}
    classifier = classifier_with_random_head(configure(tmp_path, **keys))
    seen: list[torch.Tensor] = []
    classifier.vit.register_forward_hook(lambda module, inputs, logits: seen.extend([inputs[0], logits]))
    images, labels = torch.zeros((8, *SIZE, 3), dtype=torch.uint8), multi_hot_labels().double()
    images[:4] = 255
    black, white = (standardized(torch.full((1, *SIZE, 3), value, dtype=torch.uint8)) for value in (0, 255))
    with everything_float64(monkeypatch):
        classifier.double()
        ratios = set()
        for step in range(6):
            seen.clear()
            seed_step(step)
            loss = classifier(images, labels)["loss"]
            pixels, logits = seen
            white_ratio = ((pixels - black) / (white - black)).mean((1, 2, 3))
            own = torch.where(torch.arange(8) < 4, white_ratio, 1 - white_ratio)[:, None]
            expected = F.binary_cross_entropy_with_logits(logits, own * labels + (1 - own) * labels.flip(0))
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
            ratios.add(round(own[0].item(), 3))
        assert len(ratios) > 3


@torch.no_grad()
def test_linear_probe_norm_is_folded_into_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = encoder_file(tmp_path)
    config = configure(tmp_path, start__checkpoint=path, start__trained_blocks=0, head__kind="batchnorm")
    classifier, _ = build_classifier(config)
    for _ in range(3):
        classifier(*batch(seed=4))  # updates the running statistics
    images, _ = batch(seed=5)
    with everything_float64(monkeypatch):
        classifier.double().eval()
        save_classifier(classifier.state_dict(), config, (), tmp_path / "model.safetensors")
        vit = build_vit(EncoderSpec("vit_tiny", 4, SIZE, "relative"), 5, "avg", fc_norm=False).eval()
        vit.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
        torch.testing.assert_close(vit(standardized(images)), classifier(images)["logits"], **CLOSE)


def test_position_table_is_resized_to_the_image_size(tmp_path: Path):
    path = encoder_file(tmp_path, "sincos")
    config = configure(tmp_path, start__checkpoint=path, model__position="sincos", data__image_size="[12,16]")
    classifier, report = build_classifier(config)
    assert classifier.vit.pos_embed.shape == (1, 1 + 3 * 4, TINY.dim)
    assert "2x3 -> 3x4 patches" in report
