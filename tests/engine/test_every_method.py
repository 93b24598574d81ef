"""Methods and combinations on real engines: losses of plain torch, exact resume, and a self-contained encoder file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import SMALL
from helpers.rank_checks import assert_same_bits, assert_same_run, assert_same_steps, newest, wait_for
from helpers.steps import configure, plain_steps, run_jobs
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pretrain.models.vit import CLASS_ADAPTER, ViT, fold_class_adapter
from pretrain.trainer.metrics import read_metrics

pytestmark = pytest.mark.engine

MAE = {"name": "mae", "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
LOMAR = {"name": "lomar", "num_windows": 2, "window_size": 3}
SINCOS = {"arch": "vit_tiny", "position": "sincos"}
RELATIVE = {"arch": "vit_tiny"}
LEARNED = {"arch": "vit_tiny", "position": "learned", "registers": 2}
AS_TRAINED = {"arch": "vit_tiny", "position": "bias", "layer_scale": 0.1, "registers": 1}  # SimMIM's, plus registers
PR_MIM = {"throw_ratio": 0.3, "kernel_size": 3}
LUT = {"alpha": 1.0, "hidden_dim": 16, "momentum": 0.9}
SIMMIM = {"name": "simmim", "mask_patch_size": 16}
HOG = {"name": "hog", "cell_sizes": [4, 16], "bins": 4}
LOCAL_MIM = {"name": "local_mim", "blocks": [1, 2], "decoder_embed_dim": 32, "decoder_num_heads": 2}
TOKENS = {"name": "tokens", "tokenizer": "random_projection", "vocab_size": 32}

METHODS: dict[str, dict[str, Any]] = {
    "mae": {"method": MAE, "model": SINCOS},
    "mae-num_masks-ema": {
        "method": MAE | {"num_masks": 2},
        "model": SINCOS,
        "target": {"name": "ema", "blocks": 2, "momentum": 0.9},
    },
    "lomar-pr_mim-teacher": {
        "method": LOMAR,
        "model": RELATIVE,
        "target": {"name": "teacher", "blocks": 1},
        "pr_mim": PR_MIM,
    },
    "tec-pr_mim": {
        "method": MAE | {"name": "tec", "num_queries": 4},
        "model": SINCOS,
        "target": {"name": "teacher", "blocks": 2},
        "pr_mim": PR_MIM,
    },
    "lc_mae": {"method": MAE | {"name": "lc_mae", "proj_dim": 16}, "model": SINCOS},
    "lc_mae-conv": {"method": MAE | {"name": "lc_mae", "decoder": "conv"}, "model": SINCOS},
    "ae": {"method": MAE | {"name": "ae", "block_size": 24}, "model": SINCOS},
    "simmim": {"method": SIMMIM, "model": SINCOS},
    "simmim-pr_mim": {"method": SIMMIM, "model": AS_TRAINED, "pr_mim": PR_MIM},
    "beit": {"method": {"name": "beit"}, "model": RELATIVE, "target": TOKENS},
    "lomar-beit": {"method": {**LOMAR, "mask_type": "block"}, "model": SINCOS, "target": TOKENS},
    "lomar-pr_mim": {"method": LOMAR, "model": RELATIVE, "pr_mim": PR_MIM},
    "lomar-multiscale": {
        "method": {**LOMAR, **LOCAL_MIM, "name": "lomar", "architecture": "multiscale", "decoder_depth": 1},
        "model": RELATIVE,
        "target": HOG,
    },
    "mff-pr_mim": {"method": MAE | {"name": "mff", "blocks": [1, 2]}, "model": SINCOS, "pr_mim": PR_MIM},
    "local_mim-pr_mim-lut": {"method": LOCAL_MIM, "target": HOG, "model": SINCOS, "pr_mim": PR_MIM, "lut": LUT},
    "mae-lut": {"method": MAE, "model": SINCOS, "lut": LUT},
    "simmim-lut-tokens": {"method": SIMMIM, "model": AS_TRAINED, "lut": LUT | {"supervision": "tokens"}},
    "lomar-late-pr_mim-lut": {
        "method": {**LOMAR, "mask_token_block": 1},
        "model": RELATIVE,
        "pr_mim": PR_MIM,
        "lut": LUT | {"loss": "infonce"},
    },
    "mae-encoder_mask_tokens": {
        "method": MAE | {"encoder_mask_tokens": True},
        "model": LEARNED,
        "target": TOKENS,
        "pr_mim": PR_MIM | {"aggregation": "transformer"},
    },
    "lomar-asymmetric": {
        "method": {
            **LOMAR,
            "architecture": "asymmetric",
            "decoder_embed_dim": 32,
            "decoder_depth": 1,
            "decoder_num_heads": 2,
        },
        "model": RELATIVE,
        "pr_mim": PR_MIM | {"aggregation": "convnext"},
    },
    "mae-cross": {
        "method": MAE | {"decoder": "cross", "inter_block_attention": True, "predict_ratio": 0.3},
        "model": SINCOS,
    },
    "lomar-cross-pr_mim-lut": {
        "method": {**LOMAR, **MAE, "name": "lomar", "architecture": "asymmetric", "decoder": "cross"},
        "model": RELATIVE,
        "pr_mim": PR_MIM,
        "lut": LUT,
    },
    "lomar-late": {"method": {**LOMAR, "mask_token_block": 1}, "model": LEARNED},
}


@pytest.fixture(scope="module")
def recipes(write_recipe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("recipes")
    file = str(write_teacher(folder))

    def with_file(sections: dict[str, Any]) -> dict[str, Any]:
        target = sections.get("target", {})
        return (
            sections | {"target": target | {"file": file, "resize_images": True}}
            if target.get("name") == "teacher"
            else sections
        )

    return {name: str(write_recipe(folder, name, **with_file(sections))) for name, sections in METHODS.items()}


def write_teacher(folder: Path) -> Path:
    """An encoder in the format of other projects, with larger patches than those of the trained models."""
    torch.manual_seed(7)
    with SMALL:
        encoder = ViT("vit_tiny", 20, (3, 3), relative=False)
    save_file(encoder.state_dict(), folder / "teacher.safetensors")
    return folder / "teacher.safetensors"


ZERO3 = ("train.ds_config=zero3", "train.gradient_accumulation_steps=2")  # partitions the most
ZERO1_BF16 = (
    "train.ds_config=zero1",
    "train.gradient_accumulation_steps=2",
    "train.precision=bf16",
)  # the default


@pytest.fixture(scope="module")
def zero3(recipes: dict[str, str], start_once: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero3")
    run_jobs(start_once, folder, {name: [recipe, *ZERO3] for name, recipe in recipes.items()})
    return folder


@pytest.fixture(scope="module")
def zero1_bf16(
    recipes: dict[str, str], start_once: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("zero1")
    run_jobs(start_once, folder, {name: [recipe, *ZERO1_BF16] for name, recipe in recipes.items()})
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_zero3_equals_plain_torch(method: str, recipes: dict[str, str], zero3: Path):
    assert_same_steps(zero3 / method / "whole", plain_steps(configure(recipes[method], *ZERO3))[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", ["zero1_bf16", "zero3"])
def test_four_steps_equal_two_steps_and_two_resumed_ones(stage: str, method: str, request: pytest.FixtureRequest):
    whole, resumed = (request.getfixturevalue(stage) / method / name for name in ("whole", "resumed"))
    assert_same_run(whole, resumed)
    assert_same_bits(*(torch.load(run / "state.pt") for run in (whole, resumed)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", ["zero1_bf16", "zero3"])
def test_encoder_can_be_rebuilt_from_its_file_alone(stage: str, method: str, request: pytest.FixtureRequest):
    run = request.getfixturevalue(stage) / method / "whole"
    with safe_open(run / "encoder.safetensors", "pt") as file:
        metadata = file.metadata()
    patch_size = int(metadata["patch_size"])
    height, width = (int(side) // patch_size for side in metadata["image_size"].split("x"))
    with SMALL:
        model = METHODS[method]["model"]
        encoder = ViT(
            metadata["arch"],
            patch_size,
            (height, width),
            metadata["position"] == "relative",
            shared_bias=metadata["position"] == "bias",
            learned=model.get("position") == "learned",
            registers=int(metadata.get("registers", 0)),
            layer_scale=model.get("layer_scale", 0.0),
        )
    encoder.load_state_dict(load_file(run / "encoder.safetensors"), strict=True)
    trained = torch.load(run / "state.pt")
    prefix = "method.encoder" if "lut" in method else "encoder"
    expected = {name: trained[f"{prefix}.{name}"] for name in encoder.state_dict()}
    if "tec" in method:  # its class token is a constant passed through an MLP
        expected["cls_token"] = fold_class_adapter(
            *(trained[f"encoder.{name}"] for name in ("cls_token", *CLASS_ADAPTER))
        )
    assert_same_bits(dict(encoder.state_dict()), expected)


def test_killed_run_resumes_bitwise_identically(
    write_recipe: Callable[..., Path], start: Callable[..., Any], tmp_path: Path
):
    """With data workers, for the method that adds most to LoMaR. test_resume.py kills runs of plain LoMaR."""
    recipe = write_recipe(tmp_path, **METHODS["lomar-late-pr_mim-lut"])
    keys = ("train.epochs=2", "train.ds_config=zero3", "train.precision=bf16")
    start(recipe, *keys, "name=whole").finish()
    broken = tmp_path / "runs" / "broken"
    killed = start(recipe, *keys, "name=broken")
    wait_for(broken / "checkpoints" / "step_00000005" / "manifest.json", killed)
    killed.kill()
    assert not (broken / "encoder.safetensors").exists(), "the run ended before it was killed"
    last = newest(broken)
    assert last <= "step_00000015"
    assert f"resumes from {last}" in start(recipe, *keys, "name=broken").finish()
    assert_same_run(tmp_path / "runs" / "whole", broken)


def test_terms_of_a_loss_are_logged(zero3: Path):
    rows = read_metrics(zero3 / "lc_mae" / "whole" / "metrics.jsonl")
    for row in (row for row in rows if row["loss"] is not None):
        assert row["loss"] == pytest.approx(row["loss_mae"] + row["loss_cross"] + row["loss_in"], rel=1e-5)
