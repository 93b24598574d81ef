"""Classifiers on real engines: the losses of plain torch, exact resume, and frozen weights that do not move."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.finetune_steps import CLASSES, build_small, configure, plain_steps, run_jobs
from helpers.processes import SMALL
from helpers.rank_checks import assert_same_bits, assert_same_run, assert_same_steps
from helpers.steps import STEPS
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from downstream.checkpoints.files import read_source
from downstream.classify.classifier_spec import ClassifierSpec
from downstream.classify.model import build_vit
from pretrain.models.vit import ViT

pytestmark = pytest.mark.engine

RANDOM = {"mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.5, "label_smoothing": 0.1}
ADAMW = {"base_lr": 1e-2, "weight_decay": 0.05, "betas": [0.9, 0.95], "layer_decay": 0.6}
PROBE = {"start": {"trained_blocks": 0}, "head": {"num_classes": CLASSES, "kind": "batchnorm"}}

JOBS: dict[str, dict[str, Any]] = {
    "random": {"start": {}, "augment": RANDOM, "model": {"drop_path_rate": 0.3}, "ema": {}},
    "tuned": {"start": {}, "augment": {"label_smoothing": 0.1}, "ema": {"decay": 0.9}},
    "partial": {"start": {"trained_blocks": 1}},
    "probe": {**PROBE, "ema": {"decay": 0.9}},
    "scratch-token": {"model": {"position": "sincos"}, "head": {"num_classes": CLASSES, "pool": "token"}},
    "scratch-bias": {"model": {"position": "bias"}},
}
LARS = {**PROBE, "optim": {"name": "lars", "base_lr": 10.0, "weight_decay": 0.0}}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder as pretraining saves it, with no parameter at a special value such as 0."""
    torch.manual_seed(7)
    with SMALL:
        vit = ViT("vit_tiny", 16, (4, 5))
    state = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in vit.state_dict().items()}
    metadata = {"arch": "vit_tiny", "patch_size": "16", "image_size": "64x80", "position": "relative"}
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_file(state, path, metadata)
    return path


@pytest.fixture(scope="module")
def recipes(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    def write(jobs: dict[str, dict[str, Any]]) -> dict[str, str]:
        folder = tmp_path_factory.mktemp("recipes")
        for name, sections in jobs.items():
            keys = {
                "name": name,
                "data": {"shards": "unused", "image_size": [64, 80]},
                "val": {"shards": "unused"},
                "head": {"num_classes": CLASSES},
                "optim": ADAMW,
                "train": {"epochs": 1, "precision": "fp32"},
                "log": {"every_steps": 1},
                **sections,
            }
            keys["model"] = {"arch": "vit_tiny", **sections.get("model", {})}
            if "start" in sections:
                keys["start"] = {"checkpoint": str(encoder), **sections["start"]}
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(keys))
        return {name: str(folder / f"{name}.yaml") for name in jobs}

    return write


STAGES = {
    "zero0": ("train.ds_config=zero0", "train.gradient_accumulation_steps=2", "optim.clip_grad=0.5"),
    "zero1": ("train.ds_config=zero1", "train.gradient_accumulation_steps=2", "train.precision=bf16"),
    "zero3": ("train.ds_config=zero3", "train.gradient_accumulation_steps=2"),
}


@pytest.fixture(scope="module")
def trained(
    recipes: Callable[..., dict[str, str]], start_once: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict[str, list[str]]]]:
    """trained(stage) -> folder and jobs of one launch that trains them all. Stages never share a process."""
    done: dict[str, tuple[Path, dict[str, list[str]]]] = {}

    def train(stage: str) -> tuple[Path, dict[str, list[str]]]:
        if stage not in done:
            jobs = {"tuned": JOBS["tuned"], "lars": LARS} if stage == "zero0" else JOBS
            folder = tmp_path_factory.mktemp(stage)
            lines = {name: [recipe, *STAGES[stage]] for name, recipe in recipes(jobs).items()}
            run_jobs(start_once, folder, lines)
            done[stage] = folder, lines
        return done[stage]

    return train


@pytest.mark.parametrize(("stage", "job"), [("zero0", "tuned"), ("zero0", "lars"), *(("zero3", job) for job in JOBS)])
def test_engines_equal_plain_torch(stage: str, job: str, trained: Callable[..., Any]):
    folder, jobs = trained(stage)
    config = configure(*jobs[job])
    steps, averages = plain_steps(config)
    assert_same_steps(folder / job / "whole", steps)
    if config.ema:
        saved = load_file(folder / job / "whole" / "checkpoints" / f"step_{STEPS:08d}" / "ema.safetensors")
        for name, ema in averages.items():
            if not name.endswith("qkv.bias"):  # the key bias does not affect attention: Adam follows rounding
                torch.testing.assert_close(saved[name].double(), ema, rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    ("stage", "job"), [("zero0", "lars"), *((stage, job) for stage in ("zero1", "zero3") for job in JOBS)]
)
def test_four_steps_equal_two_steps_and_two_resumed_ones(stage: str, job: str, trained: Callable[..., Any]):
    runs = [trained(stage)[0] / job / name for name in ("whole", "resumed")]
    assert_same_run(*runs)
    assert_same_bits(*(torch.load(run / "state.pt") for run in runs))


@pytest.mark.parametrize(
    ("stage", "job"), [("zero0", "lars"), *((stage, job) for stage in ("zero1", "zero3") for job in JOBS)]
)
def test_all_weights_move_except_frozen_ones(stage: str, job: str, trained: Callable[..., Any]):
    folder, jobs = trained(stage)
    config = configure(*jobs[job])
    before = build_small(config)
    after = torch.load(folder / job / "whole" / "state.pt")
    blocks = {None: ("",), 1: ("vit.blocks.1.", "vit.norm.", "vit.head."), 0: ("vit.head.",)}
    for name, parameter in before.named_parameters():
        moves = name.startswith(blocks[config.start.trained_blocks])
        assert parameter.requires_grad == moves, name
        assert torch.equal(parameter, after[name]) != moves, name


def test_classifier_checkpoint_is_rejected_as_an_encoder(encoder: Path, trained: Callable[..., Any]):
    folder, _ = trained("zero3")
    with pytest.raises(ValueError, match="is a checkpoint of a classifier, not of pretraining") as error:
        read_source(folder / "tuned" / "whole" / "checkpoints" / f"step_{STEPS:08d}")
    assert str(encoder) in str(error.value)


def rebuilt(path: Path) -> Any:
    """The timm model that the file's metadata describe, with the file's weights loaded strictly."""
    with safe_open(path, "pt") as file:
        spec = ClassifierSpec.from_metadata(file.metadata())
    state = load_file(path)
    assert spec is not None
    with SMALL:
        vit = build_vit(spec.encoder, spec.num_classes, spec.pool, fc_norm="fc_norm.weight" in state)
    vit.load_state_dict(state, strict=True)
    return vit


@pytest.mark.parametrize("job", JOBS)
@torch.no_grad()
def test_saved_file_is_the_trained_model_with_timm_names(job: str, trained: Callable[..., Any]):
    folder, jobs = trained("zero3")
    config = configure(*jobs[job])
    images = torch.randint(0, 256, (3, 64, 80, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    files = {"model": torch.load(folder / job / "whole" / "state.pt")}
    if config.ema:
        last = folder / job / "whole" / "checkpoints" / f"step_{STEPS:08d}"
        files["model_ema"] = load_file(last / "ema.safetensors")
    for file, state in files.items():
        classifier = build_small(config).eval()
        classifier.load_state_dict(state)
        vit = rebuilt(folder / job / "whole" / f"{file}.safetensors").eval()
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        logits = vit(((images / 255 - mean) / std).permute(0, 3, 1, 2))
        torch.testing.assert_close(logits, classifier(images)["logits"], rtol=1e-4, atol=1e-5)
