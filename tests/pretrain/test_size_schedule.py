"""Smaller images in earlier epochs (`data.size_schedule`): one method at several sizes with shared parameters."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers.processes import SMALL
from helpers.tiny import random_images, random_mask_indices
from torch import Tensor, nn

from pretrain.build import build_ema, build_method, untrained_teacher
from pretrain.by_size import build_sizes, resample_positions, share
from pretrain.config import PretrainConfig, load
from pretrain.methods import METHODS
from pretrain.methods.lut import LUT
from pretrain.models.vit import ViT
from pretrain.numerics import Numerics, check_settings, unserved_by_window_kernel
from pretrain.trainer.ema import NoEMA

SIZE, SMALLER = (64, 80), (48, 64)  # grids of 4x5 and 3x4 patches
ON_CPU = Numerics(compile=False, attention="sdpa", residual="fp32", sdpa="cpu")
DECODER = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
RELATIVE, SINCOS = {"arch": "vit_tiny"}, {"arch": "vit_tiny", "position": "sincos"}
MAE = DECODER | {"name": "mae"}
LOMAR = {"name": "lomar", "num_windows": 4, "window_size": 3}
HOG = {"name": "hog", "cell_sizes": [4, 16], "bins": 4}
PR_MIM = {"throw_ratio": 0.3, "kernel_size": 3}
LUT_KEYS = {"hidden_dim": 16, "momentum": 0.9}
BLOCKS = DECODER | {"blocks": [1, 2]}
TEACHER = {"name": "teacher", "blocks": 1}

CASES: dict[str, dict[str, Any]] = {
    "lomar": {"method": LOMAR, "model": RELATIVE},
    "lomar-pr_mim-sincos": {"method": LOMAR, "model": SINCOS, "pr_mim": PR_MIM},
    "lomar-complementary": {"method": LOMAR | {"window_sampling": "complementary"}, "model": RELATIVE},
    "lomar-cross-sincos": {"method": LOMAR | DECODER | {"architecture": "asymmetric", "decoder": "cross"}},
    "lomar-multiscale-lut": {"method": LOMAR | BLOCKS | {"architecture": "multiscale"}, "target": HOG, "lut": LUT_KEYS},
    "mae": {"method": MAE, "model": SINCOS},
    "mae-transformer-ema": {
        "method": MAE | {"num_masks": 2},
        "model": SINCOS | {"registers": 2},
        "target": {"name": "ema", "blocks": 2},
        "pr_mim": {"throw_ratio": 0.3, "aggregation": "transformer"},
    },
    "mae-lut-tokens": {"method": MAE, "model": SINCOS, "lut": LUT_KEYS | {"supervision": "tokens"}},
    "mae-average": {"method": MAE | {"decoder": "average"}, "model": SINCOS},
    "lc_mae-conv": {"method": MAE | {"name": "lc_mae", "decoder": "conv"}, "model": SINCOS},
    "simmim-pr_mim": {"method": {"name": "simmim", "mask_patch_size": 16}, "model": RELATIVE, "pr_mim": PR_MIM},
    "beit": {"method": {"name": "beit"}, "model": SINCOS, "target": {"name": "tokens", "vocab_size": 32}},
    "ae": {"method": DECODER | {"name": "ae", "block_size": 24}, "model": SINCOS},
    "mff": {"method": BLOCKS | {"name": "mff"}, "model": SINCOS},
    "local_mim": {"method": BLOCKS | {"name": "local_mim"}, "model": RELATIVE, "target": HOG},
    "tec": {"method": DECODER | {"name": "tec", "num_queries": 4}, "model": SINCOS, "target": TEACHER},
}


def configure(folder: Path, sections: dict[str, Any], *overrides: str) -> PretrainConfig:
    data = {"shards": "none", "image_size": list(SIZE), "size_schedule": "0:48x64,2:64x80"}
    keys = {"name": "small", "data": data, "train": {"epochs": 4, "global_batch_size": 8, "precision": "fp32"}}
    keys |= {"optim": {"warmup_epochs": 0}, "model": SINCOS}
    (folder / "small.yaml").write_text(yaml.safe_dump(copy.deepcopy(keys | sections)))
    with SMALL:
        return load(str(folder / "small.yaml"), list(overrides))


def build_scheduled(config: PretrainConfig) -> tuple[Any, NoEMA, Any]:
    """The method for all sizes, its moving average, and the mask sampler of the smaller size."""
    with SMALL:
        method = build_method(config, untrained_teacher(config))
        ema = build_ema(config, method, torch.device("cpu"))
        (smaller,) = build_sizes(config, method, ema, ON_CPU, untrained_teacher)
    assert (smaller.epoch, smaller.size) == (2, SMALLER)
    return method.train(), ema, smaller.mask_sampler


def batch_of(config: PretrainConfig, sampler: Any, size: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
    rng = np.random.default_rng(3)
    images = torch.from_numpy(rng.integers(0, 256, (3, len(config.augmentations), *size, 3), dtype=np.uint8))
    drawn = [sampler(rng) for _ in range(3)]
    return images.squeeze(1), {name: torch.from_numpy(np.stack([one[name] for one in drawn])) for name in drawn[0]}


def perturb(module: nn.Module) -> None:
    """Changes every parameter, as training would, so that none keeps its initial value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_cases_cover_every_method():
    assert {case["method"]["name"] for case in CASES.values()} == METHODS.keys()


@pytest.mark.parametrize("case", CASES)
def test_smaller_size_equals_a_method_built_for_that_size(case: str, tmp_path: Path):
    """Loss and gradients are bitwise identical, also after the weights have changed."""
    config = configure(tmp_path, CASES[case])
    method, ema, sampler = build_scheduled(config)
    images, mask_indices = batch_of(config, sampler, SMALLER)
    method(images, mask_indices, **ema.model_inputs(images))  # a first call must not freeze the shared state
    perturb(method)
    if ema.model is not None:
        perturb(ema.model)
    ((_, smaller),) = config.earlier
    with SMALL:
        alone = build_method(smaller, untrained_teacher(smaller))
        alone_ema = build_ema(smaller, alone, torch.device("cpu"))
    pairs = [(method, alone), (ema.model, alone_ema.model)] if ema.model else [(method, alone)]
    for module, other in pairs:
        assert module is not None
        assert other is not None
        share(module, copied := copy.deepcopy(other), config.grid, smaller.grid)  # resamples the positions
        other.load_state_dict(copy.deepcopy(copied.state_dict()))
        for name, table in copied.named_buffers():
            if name.endswith("pos_embed"):
                other.get_submodule(name.rpartition(".")[0]).pos_embed = table.clone()
    if isinstance(method, LUT):  # the first call has updated the running statistics
        assert not torch.equal(method.projector[1].running_mean, torch.zeros(16))
    results = []
    for one, average in ((method, ema), (alone.train(), alone_ema)):
        one.zero_grad()
        loss = one(images, mask_indices, **average.model_inputs(images))["loss"]
        loss.backward()
        results.append((loss, {name: parameter.grad for name, parameter in one.named_parameters()}))
    (loss, gradients), (expected, expected_gradients) = results
    assert torch.equal(loss, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient is not None, f"{name} is trained"
        assert torch.equal(gradient, expected_gradients[name]), name


@pytest.mark.parametrize("case", ["lomar-pr_mim-sincos", "mae-lut-tokens", "mae-transformer-ema"])
def test_last_size_equals_a_run_without_a_schedule(case: str, tmp_path: Path):
    config = configure(tmp_path, CASES[case])
    plain = configure(tmp_path, CASES[case], "data.size_schedule=none")
    method, ema, _ = build_scheduled(config)
    with SMALL:
        expected = build_method(plain, untrained_teacher(plain))
        expected_ema = build_ema(plain, expected, torch.device("cpu"))
    assert list(method.state_dict()) == list(expected.state_dict())
    images, mask_indices = batch_of(config, expected.mask_sampler(), SIZE)
    losses = [
        one(images, mask_indices, **average.model_inputs(images))["loss"]
        for one, average in ((method, ema), (expected.train(), expected_ema))
    ]
    assert torch.equal(*losses)


def test_masks_and_windows_scale_with_the_grid(tmp_path: Path):
    def drawn(case: str, *overrides: str) -> dict[str, tuple[int, ...]]:
        sample = build_scheduled(configure(tmp_path, CASES[case], *overrides))[2](np.random.default_rng(0))
        return {name: array.shape for name, array in sample.items()}

    assert drawn("mae") == {"visible": (3,), "masked": (9,), "kept": (9,)}
    assert drawn("simmim-pr_mim") == {"visible": (4,), "masked": (8,), "kept": (8 - 3,)}
    windows = drawn("lomar")
    assert windows["positions"] == (2, 9), "4 windows for 20 patches, so 2 for 12; distinct ones, of the only 2"
    assert windows["masked"] == (2, 7)
    assert drawn("lomar-complementary")["positions"] == (2, 9)
    assert drawn("lomar", "method.num_windows=6")["positions"] == (2, 9), "not the same window twice"
    assert drawn("lomar-complementary", "method.num_windows=6")["positions"] == (4, 9), "under as many masks"


def test_num_windows_of_the_recipe_scales_with_the_image_area():
    config = load("lomar_vitb16_224_400e", ["data.shards=none", "data.size_schedule=0:112 9:128 19:160,29:192,39:224"])
    assert config.data.size_schedule == "0:112,9:128,19:160,29:192,39:224", "written in one way"
    assert [(end, one.data.image_size, one.method.num_windows) for end, one in config.earlier] == [
        (9, (112, 112), 1),
        (19, (128, 128), 1),
        (29, (160, 160), 2),
        (39, (192, 192), 3),
    ]


@pytest.mark.parametrize("downsampled", [True, False])
def test_positions_are_resampled_with_antialiased_bicubic(downsampled: bool):
    encoder = ViT("vit_tiny", 16, (6, 4), relative=False)
    other = (3, 2) if downsampled else (9, 8)
    image = encoder.pos_embed[0, 1:].T.unflatten(1, (6, 4))[None]
    expected = F.interpolate(image, other, mode="bicubic", antialias=True).flatten(2)[0].T
    resampled = resample_positions(encoder.pos_embed, (6, 4), other)
    assert torch.equal(resampled[0, 0], encoder.pos_embed[0, 0]), "the class token's"
    assert torch.equal(resampled[0, 1:], expected)
    assert torch.equal(resample_positions(encoder.pos_embed[0, 1:], (6, 4), other)[0], expected)


def test_parameters_that_fit_only_one_grid_are_rejected_by_name():
    method, other = (nn.ModuleDict({"table": nn.Linear(count, 2)}) for count in (20, 12))
    with pytest.raises(ValueError, match=r"table\.weight is \[2, 20\], and \[2, 12\] for 3x4 patches: leave it out"):
        share(method, other, (4, 5), (3, 4))


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("lomar", "0:96,9:224", "has 96: method.window_size=7 is larger than .* nearest sizes that fit: 112 [(]"),
        (
            "lomar",
            "0:100,9:224",
            "has 100: 100 is not a multiple of model.patch_size=16; .* nearest sizes that fit: 112 [(]",
        ),
        ("lomar", "0:96x128,9:224", "has 96x128: method.window_size=7 .* nearest sizes that fit: 112x144 [(]"),
        (
            "simmim",
            "0:144,9:224 model.position=relative",
            "has 144: method.mask_patch_size=32 .* that fit: 128 and 160",
        ),
        ("local_mim", "0:112,9:224", "has 112: target.cell_sizes has 32, .* nearest sizes that fit: 96 and 128$"),
        (
            "mae",
            "0:16,9:224",
            "has 16: method.mask_ratio=0.75 masks 1 of the image's 1 .* nearest sizes that fit: 32 [(]",
        ),
        ("simmim", "0:128,9:224", "model.position=bias has parameters for one grid .* set model.position=sincos"),
        ("mae", "0:128,9:224 model.position=learned", "model.position=learned has parameters for one grid"),
        (
            "lomar",
            "0:128,9:192",
            "ends with 192, but the encoder is built for data.image_size=224: end it with 9:224, or set data.image_siz",
        ),
        ("lomar", "2:128,9:224", "does not start at epoch 0: put 0:128 first"),
        ("lomar", "0:128,9:192,9:224", "the epochs must increase, as in"),
        ("lomar", "0:128,400:224", "its last size at epoch 400, but train.epochs=400: start it at epoch 3"),
        (
            "lomar",
            "0:128,6:224 data.repeats=4",
            "epoch 6, in the middle of .*repeats=4 epochs: change it at epoch 4 or 8",
        ),
        (
            "lomar",
            "0:128,2:224 data.repeats=4",
            "epoch 2, in the middle of .*repeats=4 epochs: change it at epoch 4 or 8",
        ),
        ("lomar", "128", "write each size after the epoch it starts at, such as 0:128,60:192,180:224"),
    ],
)
def test_invalid_schedules_are_rejected_with_a_suggestion(recipe: str, overrides: str, message: str):
    schedule, *others = overrides.split(" ")
    recipes = {"lomar": "224_400e", "simmim": "224_800e", "local_mim": "224_1600e", "mae": "224_1600e"}
    with pytest.raises(ValueError, match=message) as error:
        load(f"{recipe}_vitb16_{recipes[recipe]}", ["data.shards=none", f"data.size_schedule={schedule}", *others])
    assert "data.size_schedule=" in str(error.value)
    assert len(str(error.value).splitlines()) == 1, "once, and nothing else"


def test_error_that_applies_at_every_size_is_reported_once():
    overrides = ["data.shards=none", "data.size_schedule=0:128,9:224", "pr_mim.throw_ratio=0.9"]
    with pytest.raises(ValueError, match=r"^pr_mim\.throw_ratio=0\.9 throws") as error:
        load("lomar_vitb16_224_400e", overrides)
    assert len(str(error.value).splitlines()) == 1


def test_resume_signature_includes_the_schedule_if_set(tmp_path: Path):
    """Older runs, which do not have this key, match its default."""
    with_one = configure(tmp_path, CASES["lomar"]).resume_signature()["data"]
    without = configure(tmp_path, CASES["lomar"], "data.size_schedule=none").resume_signature()["data"]
    assert with_one == without | {"size_schedule": "0:48x64,2:64x80"}
    assert "size_schedule" not in without


def test_zero_stage_3_and_cuda_graphs_are_rejected_with_a_schedule(tmp_path: Path):
    config = configure(tmp_path, CASES["lomar"])
    check_settings(config, 2)
    with pytest.raises(ValueError, match=r"ZeRO stage 3 partitions those of only one: set train\.ds_config=zero2"):
        check_settings(config, 3)
    graphs = config.model_copy(update={"model": config.model.model_copy(update={"cuda_graphs": "on"})})
    with pytest.raises(ValueError, match=r"several sizes, but a graph records only one; set model\.cuda_graphs=auto"):
        check_settings(graphs, 1)
    constant = configure(tmp_path, CASES["lomar"], "data.size_schedule=0:64x80")
    check_settings(constant, 3)


def test_recompile_limit_scales_with_the_number_of_sizes(tmp_path: Path):
    """Beyond torch's limit, blocks would run uncompiled. A resumed run compiles fewer sizes and would then differ."""
    config = configure(tmp_path, CASES["lomar"], "data.size_schedule=0:48x64,1:48x48,2:64x80")
    with SMALL, torch._dynamo.config.patch(recompile_limit=8):
        build_sizes(config, build_method(config), NoEMA(), replace(ON_CPU, compile=True), untrained_teacher)
        assert torch._dynamo.config.recompile_limit == 3 * 8


def test_window_kernel_is_used_only_if_it_supports_all_sizes():
    square = ["data.shards=none", "model.position=relative", "data.image_size=112"]
    recipe = "simmim_vitb16_224_800e"
    small = [*square, "method.mask_patch_size=16"]
    assert unserved_by_window_kernel(load(recipe, small)) == ""
    uneven = load(recipe, [*small, "data.size_schedule=0:96x112,9:112"])
    assert "not 6x7" in unserved_by_window_kernel(uneven)


def test_reconstructions_have_the_last_size(tmp_path: Path):
    method, _, _ = build_scheduled(configure(tmp_path, CASES["mae"]))
    shown = method.reconstruct(random_images(method), random_mask_indices(method))
    assert {image.shape[1:3] for image in shown.values()} == {SIZE}
