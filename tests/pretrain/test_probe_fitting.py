"""Fitting of probes: batches, learning rates, the attentive probe, crops, fine-tuning, and kinds of features."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import random_images, tiny_lomar, tiny_vit

from data.eval_loader import EvalLoader
from pretrain.models.features import features, image_features, pooled_features
from pretrain.models.patches import normalize_pixels
from pretrain.probe import attentive, finetuning
from pretrain.probe.attentive import AttentiveProbe, fit_attentive_probe, token_statistics
from pretrain.probe.finetuning import FinetunedEncoder, crop_and_flip, finetune, layer_decay_groups
from pretrain.probe.fitting import draw_batches, learning_rate
from pretrain.trainer.optim import layers_above

CPU = torch.device("cpu")


class SingleRankLoader:
    """The attributes of a loader that fitting reads, on a single rank."""

    world_size, batch = 1, 8


def test_batches_cover_the_samples_in_a_new_order_each_pass():
    samples = np.arange(10, 31)
    batches = list(draw_batches(samples, 5, 9))
    assert [len(batch) for batch in batches] == [5] * 9
    passes = [np.concatenate(batches[start : start + 4]) for start in (0, 4)]
    for seen in passes:
        assert len(set(seen.tolist())) == 20  # of 21
        assert set(seen.tolist()) <= set(samples.tolist())
    assert passes[0].tolist() != passes[1].tolist()
    assert [batch.tolist() for batch in draw_batches(samples, 5, 9)] == [batch.tolist() for batch in batches]
    few = list(draw_batches(samples[:3], 5, 4))
    assert all(sorted(batch.tolist()) == [10, 11, 12] for batch in few)


def test_learning_rate_warms_up_and_decays_to_almost_zero():
    rates = [learning_rate(step, 50, 2.0) for step in range(50)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert all(first > second > 0 for first, second in pairwise(rates[4:]))
    assert rates[5 + 22] == pytest.approx(1 + math.cos(math.pi * 23 / 46))
    assert learning_rate(0, 1, 2.0) == 2.0


def naive_attentive_probe(probe: AttentiveProbe, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of one image's (N, D) tokens, query by query and token by token."""
    x = (tokens.double() - probe.mean.double()) / probe.std.double()
    values = []
    for query, projection in zip(probe.query.double(), probe.value.double(), strict=True):
        logits = [(query @ token).item() for token in x]
        weights = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
        values.append(sum(weight * (token @ projection) for weight, token in zip(weights, x, strict=True)))
    return probe.weight.double() @ torch.cat(values) + probe.bias.double()


def test_attentive_probe_equals_a_naive_loop():
    torch.manual_seed(0)
    probe = AttentiveProbe(torch.randn(40), torch.rand(40) + 0.5, 5)
    for parameter in probe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randn(3, 9, 40)
    expected = torch.stack([naive_attentive_probe(probe, image) for image in tokens])
    torch.testing.assert_close(probe(tokens).double(), expected, rtol=1e-4, atol=1e-4)


def test_token_statistics_equal_those_of_concatenated_tokens():
    tokens = {number: attentive.store(torch.randn(9, 6) * 3 + number) for number in range(5)}
    mean, std = token_statistics(tokens, np.array([1, 2, 4]), 6, 1, CPU)
    together = torch.cat([tokens[number].double() for number in (1, 2, 4)])
    torch.testing.assert_close(mean.double(), together.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(std.double(), together.std(0, unbiased=False), rtol=1e-5, atol=1e-5)


def test_attentive_probe_finds_information_that_mean_pooling_loses():
    """One patch is marked in half of its channels; the sign of its other half is the class."""
    torch.manual_seed(0)
    labels = np.arange(400) % 2
    tokens = torch.randn(400, 16, 64)
    every, marked = torch.arange(400), torch.randint(0, 16, (400,))
    tokens[every, marked, :32] += 2.0
    tokens[every, marked, 32:] = torch.from_numpy(labels - 0.5).float()[:, None]
    kept = {number: attentive.store(image) for number, image in enumerate(tokens)}
    loader: EvalLoader = SingleRankLoader()  # type: ignore[assignment]
    options = {"steps": 120, "dim": 64, "device": CPU}
    fitted = [fit_attentive_probe(kept, np.arange(300), labels, 2, loader, **options) for _ in range(2)]
    truth = torch.from_numpy(labels[300:])
    assert (fitted[0](tokens[300:]).argmax(1) == truth).float().mean() > 0.95
    means = tokens.mean(1)
    solution = torch.linalg.lstsq(means[:300], torch.from_numpy(2.0 * labels[:300, None] - 1).float()).solution
    assert ((means[300:] @ solution > 0)[:, 0] == truth).float().mean() < 0.9
    assert all(torch.equal(*pair) for pair in zip(*(probe.parameters() for probe in fitted), strict=True))


def test_fine_tuning_uses_layer_decay_for_every_parameter():
    model = FinetunedEncoder(tiny_vit(2, (4, 4)), 3, False)
    groups = {id(group["params"][0]): group for group in layer_decay_groups(model)}
    assert len(groups) == len(list(model.parameters()))
    named = {name: groups[id(parameter)] for name, parameter in model.named_parameters()}
    scales = {name: round(math.log(group["lr_scale"], finetuning.LAYER_DECAY)) for name, group in named.items()}
    assert {scales["weight"], scales["bias"], scales["encoder.norm.bias"]} == {0}
    assert (scales["encoder.blocks.1.mlp.fc1.weight"], scales["encoder.blocks.0.norm1.bias"]) == (1, 2)
    assert {scales["encoder.cls_token"], scales["encoder.patch_embed.proj.weight"]} == {3}
    assert named["encoder.blocks.0.norm1.bias"]["weight_decay"] == 0
    assert named["encoder.blocks.0.attn.qkv.weight"]["weight_decay"] == finetuning.WEIGHT_DECAY


@pytest.mark.parametrize("options", [{"learned": True, "registers": 2}, {"shared_bias": True}, {"layer_scale": 0.1}])
def test_layers_above_is_defined_for_every_encoder_parameter(options: dict[str, Any]):
    encoder = tiny_vit(2, (4, 4), relative=False, **options)
    encoder.class_adapter = torch.nn.Linear(16, 16)
    for name, _ in encoder.named_parameters():
        above = layers_above(name, 2)
        if name.startswith("blocks."):
            assert above == 2 - int(name.split(".")[1])
        else:
            assert above == (0 if name.startswith("norm.") else 3), name


def test_crops_stay_inside_the_image_and_depend_on_step_and_sample():
    ramp = torch.arange(32.0).expand(40, 32, 32)
    images = torch.stack([ramp, ramp.mT, torch.full_like(ramp, 100)], dim=-1).byte()
    numbers = np.arange(40)
    crops = crop_and_flip(images, 3, numbers)
    assert torch.equal(crops[5:9], crop_and_flip(images[5:9], 3, numbers[5:9]))
    assert not torch.equal(crops, crop_and_flip(images, 4, numbers))
    torch.testing.assert_close(crops[..., 2], torch.full((40, 32, 32), 100.0))
    slope = (crops[:, :, 20, 0] - crops[:, :, 10, 0]).mean(1) / 10
    down = (crops[:, 20, :, 1] - crops[:, 10, :, 1]).mean(1) / 10
    torch.testing.assert_close(slope.abs(), down, rtol=0.01, atol=0.01)
    assert (down > 0.55).all()  # the smallest crop is 0.35 of the area: 0.59 of each side
    assert (down < 1.001).all()
    assert 8 < (slope < 0).sum() < 32


def test_fine_tuning_learns_and_does_not_change_the_encoder():
    model = tiny_lomar((4, 4), 4)
    images = random_images(model, 24)
    labels = np.arange(24) % 3
    for image, label in zip(images, labels.tolist(), strict=True):
        image[..., label] //= 4
    before = [parameter.clone() for parameter in model.encoder.parameters()]
    state = torch.get_rng_state()
    loader: EvalLoader = SingleRankLoader()  # type: ignore[assignment]
    kept = dict(enumerate(images))
    tuned = finetune(
        model.encoder, kept, np.arange(24), labels, 3, loader, epochs=30, norm_after_pool=False, device=CPU
    )
    assert (tuned(images).argmax(1).numpy() == labels).mean() > 0.9
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(*pair) for pair in zip(model.encoder.parameters(), before, strict=True))
    changed = zip(tuned.encoder.parameters(), before, strict=True)
    assert all(not torch.equal(*pair) for pair in changed)


@pytest.mark.parametrize("norm_after_pool", [False, True])
def test_kinds_of_features_are_consistent(norm_after_pool: bool):
    model = tiny_lomar((4, 4), 2)
    images, encoder = random_images(model), model.encoder
    kinds = ("class_mean", "class", "mean", "prefix", "patches")
    both, first, mean, prefix, patches = pooled_features(encoder, images, kinds, norm_after_pool=norm_after_pool)
    assert torch.equal(both, torch.cat([first, mean], dim=1))
    assert torch.equal(prefix, first)
    assert not torch.equal(mean, first)
    assert torch.allclose(mean, patches.mean(1), atol=1e-6) is not norm_after_pool
    assert torch.equal(image_features(encoder, images, "mean", (), norm_after_pool), mean)
    stacked = image_features(encoder, images, "patches", (1, 2))
    assert torch.equal(stacked, torch.cat([image_features(encoder, images, "patches", (n,)) for n in (1, 2)], dim=-1))


def test_prefix_features_average_class_token_and_registers():
    encoder = tiny_vit(2, (4, 4), registers=2)
    images = torch.randint(0, 256, (3, 8, 8, 3), generator=torch.Generator().manual_seed(0)).byte()
    tokens = features(encoder, normalize_pixels(images).movedim(-1, 1))
    assert tokens.shape[1] == 3 + 16
    first, prefix, patches, mean = pooled_features(encoder, images, ("class", "prefix", "patches", "mean"))
    assert torch.equal(first, tokens[:, 0])
    assert torch.equal(prefix, tokens[:, :3].mean(1))
    assert torch.equal(patches, tokens[:, 3:])
    assert torch.equal(mean, tokens[:, 3:].mean(1))
