"""Tests for LUT: losses against the reference, disjoint views, batch norm, the teacher, and rejected settings."""

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from helpers import reference, reference_lut, reference_mae
from helpers.tiny import TINY, everything_float64, randomize, tiny_method
from torch import Tensor

from pretrain.config import load
from pretrain.methods.lut import LUT, LUTConfig, Teacher, TeacherModel, disjoint_mask
from pretrain.methods.pr_mim import PRMIMConfig
from pretrain.models.heads import SyncBatchNorm
from pretrain.trainer.ema import cosine_momentum
from pretrain.trainer.optim import parameter_groups

GRID, PATCH_SIZE = (4, 6), 2
MAE = {"name": "mae", "decoder_embed_dim": 12, "decoder_depth": 1, "decoder_num_heads": 3}
SIMMIM = {"name": "simmim", "mask_patch_size": 4}
LOMAR = {"name": "lomar", "num_windows": 2, "window_size": 3}
ASYMMETRIC = {"architecture": "asymmetric", "decoder_embed_dim": 12, "decoder_depth": 1, "decoder_num_heads": 3}
CROSS = {
    "decoder": "cross",
    "inter_block_attention": True,
    "mask_type": "cell",
    "mask_patch_size": 4,
    "mask_ratio": 0.6,
    "predict_ratio": 0.25,
}
PR_MIM = PRMIMConfig(throw_ratio=0.3, kernel_size=3)
CASES = [
    pytest.param(MAE, False, None, {}, id="mae"),
    pytest.param(MAE, False, PR_MIM, {"supervision": "tokens", "loss": "smooth_l1"}, id="mae-pr_mim-tokens"),
    pytest.param(SIMMIM, False, None, {"loss": "infonce", "temperature": 0.5}, id="simmim-infonce"),
    pytest.param(SIMMIM, True, PR_MIM, {}, id="simmim-relative-pr_mim"),
    pytest.param(LOMAR, True, None, {"loss": "smooth_l1"}, id="lomar-smooth"),
    pytest.param(
        {**LOMAR, "mask_token_block": 1}, True, PR_MIM, {"supervision": "tokens"}, id="lomar-late-pr_mim-tokens"
    ),
    pytest.param(LOMAR, False, None, {"loss": "infonce"}, id="lomar-absolute-infonce"),
    pytest.param(
        {**MAE, "encoder_mask_tokens": True},
        False,
        PR_MIM,
        {"supervision": "tokens"},
        id="mae-encoder_mask_tokens-tokens",
    ),
    pytest.param({**LOMAR, **ASYMMETRIC}, True, None, {"supervision": "tokens"}, id="lomar-asymmetric-tokens"),
    pytest.param({**MAE, **CROSS}, False, None, {}, id="mae-cross-inter_block-cell-part"),
]


def build(keys: dict[str, Any], relative: bool, pr_mim: PRMIMConfig | None, lut: dict[str, Any]) -> LUT:
    return LUT(LUTConfig(hidden_dim=8, alpha=0.7, **lut), tiny_method(keys, GRID, PATCH_SIZE, relative, pr_mim))


def batch(model: LUT, count: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    shape = (count, 2, GRID[0] * PATCH_SIZE, GRID[1] * PATCH_SIZE, 3)
    images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(2)).byte()
    samples = [model.mask_sampler()(np.random.default_rng((3, i))) for i in range(count)]
    return images, {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}


def perturbed_teacher(model: LUT) -> TeacherModel:
    """A teacher whose weights and batch statistics differ from the model's."""
    teacher, generator = model.teacher_model(), torch.Generator().manual_seed(5)
    for tensor in [*teacher.parameters(), *teacher.projector.buffers()]:
        tensor.data += torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 0.3
    return teacher


def loss_and_gradients(
    model: LUT, images: Tensor, mask_indices: dict[str, Tensor], teacher_features: Tensor
) -> tuple[dict, dict]:
    model.zero_grad()
    losses = model(images, mask_indices, teacher_features)
    losses["loss"].backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def naive_losses(model: LUT, images: Tensor, mask_indices: dict, weights: dict, teacher: dict) -> tuple[Tensor, Tensor]:
    """The method's own loss on the first views, and the context loss."""
    config, method, norm_pix = model.config, model.method.config, model.method.target.norm_pix
    own = {name.removeprefix("method."): w for name, w in weights.items() if name.startswith("method.")}
    first = {name: index[:, 0] for name, index in mask_indices.items()}
    if method.name == "mae":
        error = reference_mae.pixel_error(PATCH_SIZE, norm_pix)
        mim = reference_mae.mae_loss(images[:, 0], first, own, TINY.heads, method.decoder_num_heads, error)
    elif method.name == "simmim":
        mim = reference.simmim_loss(images[:, 0], first, own, TINY.heads)
    else:
        keys = (norm_pix, method.mask_token_block, method.decoder_num_heads)
        mim = reference.lomar_loss(images[:, 0], first, own, TINY.heads, *keys)
    pooled, mask_token_block = config.supervision == "pooled", getattr(method, "mask_token_block", 0)
    arguments = (weights, teacher, TINY.heads, pooled, config.loss, config.temperature, mask_token_block)
    return mim, reference_lut.context_loss(images, mask_indices, *arguments)


@pytest.mark.parametrize(("keys", "relative", "pr_mim", "lut"), CASES)
def test_equals_the_reference_in_float64_and_fp32(
    keys: dict, relative: bool, pr_mim: PRMIMConfig | None, lut: dict, monkeypatch: pytest.MonkeyPatch
):
    model = build(keys, relative, pr_mim, lut)
    randomize(model)
    images, mask_indices = batch(model)
    teacher_model = perturbed_teacher(model)
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    teacher = {name: t.double() for name, t in teacher_model.state_dict().items() if name != "encoder.pos_embed"}
    fixed = {name: tensor.double() for name, tensor in model.state_dict().items() if ".encoder.norm." in name}
    mim, context = naive_losses(model, images, mask_indices, fixed | weights, teacher)
    (mim + 0.7 * context).backward()
    single, single_gradients = loss_and_gradients(model, images, mask_indices, teacher_model(images))
    with everything_float64(monkeypatch):
        exact_model = build(keys, relative, pr_mim, lut)
        exact_model.load_state_dict(dict(model.named_parameters()), strict=False)
        exact_teacher = exact_model.teacher_model()
        trained = {name: w for name, w in teacher_model.state_dict().items() if name != "encoder.pos_embed"}
        exact_teacher.load_state_dict(trained, strict=False)
        exact, gradients = loss_and_gradients(exact_model, images, mask_indices, exact_teacher(images))
    torch.testing.assert_close(exact["loss_mim"], mim.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(exact["loss_context"], context.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(exact["loss"].detach(), (mim + 0.7 * context).detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(single["loss"].detach().double(), exact["loss"].detach(), rtol=1e-4, atol=0)
    assert weights.keys() == gradients.keys() == single_gradients.keys(), "every parameter has a gradient"
    for name, weight in weights.items():
        largest = weight.grad.abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(gradients[name], weight.grad, rtol=0, atol=1e-8 * largest, msg=name)


@pytest.mark.parametrize(("keys", "relative", "pr_mim", "lut"), CASES)
def test_the_two_views_show_disjoint_patches(keys: dict, relative: bool, pr_mim: PRMIMConfig | None, lut: dict):
    model = build(keys, relative, pr_mim, lut)
    sampler = pickle.loads(pickle.dumps(model.mask_sampler()))
    for seed in range(20):
        both, alone = sampler(np.random.default_rng(seed)), model.method.mask_sampler()(np.random.default_rng(seed))
        assert all((both[name][0] == alone[name]).all() for name in alone), "the first view is the method's own"
        patches = model.method.mask_grid[0] * model.method.mask_grid[1]
        by_window = {name: index.reshape(2, -1, index.shape[-1]) for name, index in both.items()}
        for w in range(by_window["visible"].shape[1]):
            one, two = (set(by_window["visible"][view, w]) for view in (0, 1))
            assert not one & two
            for view, visible in ((0, one), (1, two)):
                shown_or_predicted = sorted([*visible, *by_window["masked"][view, w]])
                assert shown_or_predicted == sorted({*shown_or_predicted})
                assert "predict_ratio" in keys or shown_or_predicted == list(range(patches))
                assert set(by_window["kept"][view, w]) <= set(by_window["masked"][view, w])
        if "positions" in both:
            assert (both["positions"][0] == both["positions"][1]).all()


def test_second_view_shows_whole_cells_uniformly_from_the_masked_ones():
    masked = np.ones((1, 24), dtype=bool)
    masked[0, [0, 1, 6, 7]] = False  # one 2x2 cell in a grid of 4x6 patches
    counts = np.zeros(24)
    for seed in range(3000):
        counts += ~disjoint_mask(np.random.default_rng(seed), masked, GRID, 2)[0]
    cells = counts.reshape(2, 2, 3, 2).transpose(0, 2, 1, 3).reshape(6, 4)
    assert (cells == cells[:, :1]).all()
    assert cells[0, 0] == 0
    assert abs(cells[1:, 0] / 3000 - 0.2).max() < 0.03


def test_teacher_sees_all_patches_and_the_student_only_visible_ones():
    model = build(LOMAR, True, None, {})
    randomize(model)
    images, mask_indices = batch(model, 2)
    teacher = perturbed_teacher(model)
    loss = model(images, mask_indices, teacher(images))
    visible = set(mask_indices["positions"][0, 1].gather(1, mask_indices["visible"][0, 1]).flatten().tolist())
    assert visible
    not_visible = next(i for i in range(24) if i not in visible)
    changed = images.clone()
    row, col = divmod(not_visible, GRID[1])
    changed[0, 1, row * PATCH_SIZE, col * PATCH_SIZE] ^= 255
    again = model(changed, mask_indices, teacher(images))
    assert torch.equal(again["loss"], loss["loss"]), "a patch of the second view that no window shows"
    assert not torch.equal(teacher(changed), teacher(images))


def test_batch_norm_matches_torch_and_skips_nonfinite_statistics():
    ours, theirs = SyncBatchNorm(5), torch.nn.BatchNorm1d(5)
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    mine, reference_input = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = torch.linspace(-1, 1, 35).view(7, 5)
    for layer, inputs in ((ours, mine), (theirs, reference_input)):
        (layer(inputs) * weight).sum().backward()
    torch.testing.assert_close(mine.grad, reference_input.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    before = ours.running_mean.clone()
    ours.train()(x * torch.tensor([1.0, 1, math.nan, 1, 1]))
    assert ours.running_mean[2] == before[2]
    assert (ours.running_mean[[0, 1, 3, 4]] != before[[0, 1, 3, 4]]).all()


def test_teacher_update_uses_the_scheduled_momentum():
    model = build(MAE, False, None, {"momentum": 0.9, "final_momentum": 1.0})
    teacher = Teacher(model, torch.device("cpu"), bf16=False)
    start = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    randomize(model)
    student = {name.removeprefix("method."): tensor for name, tensor in model.state_dict().items()}
    for progress in (0.25, 1.0):
        teacher.update(progress)
    m = 1 - 0.1 * 0.5 * (1 + math.cos(math.pi * 0.25))
    assert cosine_momentum(0.9, 1.0, 0.25) == m
    assert cosine_momentum(0.9, 1.0, 1.0) == 1.0
    for name, tensor in teacher.model.state_dict().items():
        torch.testing.assert_close(tensor, m * start[name] + (1 - m) * student[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("keys", "relative", "pr_mim", "lut"), CASES[:9:3])
def test_overfits_one_batch(keys: dict, relative: bool, pr_mim: PRMIMConfig | None, lut: dict):
    model = build(keys, relative, pr_mim, lut)
    images, mask_indices = batch(model, 2)
    teacher_features = perturbed_teacher(model)(images)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=3e-3)
    losses = []
    for _ in range(150):
        loss = model(images, mask_indices, teacher_features)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("mae_vitb16_224_1600e", ["method.mask_ratio=0.4"], r"2 x 117 is more than 196"),
        ("mae_vitb16_224_1600e", ["lut.momentum=1.2"], r"lut.momentum=1.2"),
        ("mae_vitb16_224_1600e", ["lut.momentum=-0.1"], r"lut.momentum=-0.1"),
        ("mae_vitb16_224_1600e", ["method.mask_type=block"], r"set method.mask_type=random, not block"),
        (
            "mae_vitb16_224_1600e",
            ["train.global_batch_size=4", "train.gradient_accumulation_steps=4"],
            r"is a single image: raise train.global_batch_size",
        ),
        ("mae_vitb16_224_1600e", ["lut.loss=infonce", "lut.supervision=tokens"], r"lut.supervision=pooled"),
        ("mae_vitb16_224_1600e", ["lut.loss=infonce", "data.repeats=2"], r"the same image .*: set data.repeats=1"),
        (
            "beit_vitb16_224_800e",
            ["target.tokenizer=random_projection"],
            r"lut works with local_mim, lomar, mae, mff, simmim, not with beit: leave it out",
        ),
        ("lc_mae_vitb16_224_100e", [], r"not with lc_mae"),
        ("ae_vitb16_224_100e", [], r"not with ae"),
    ],
)
def test_incompatible_settings_are_rejected(recipe: str, overrides: list[str], message: str):
    common = ["name=x", "data.shards=x", "lut.alpha=0.25"]
    load("mae_vitb16_224_1600e", common)
    with pytest.raises(ValueError, match=message):
        load(recipe, [*common, *overrides])
