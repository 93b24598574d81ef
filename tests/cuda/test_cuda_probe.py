"""Probes on a GPU: deterministic, and close to a CPU where features are frozen."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.labeled_images import write_classes

from data.eval_loader import EvalLoader
from data.image_folder import load_samples
from pretrain.models.sdpa import set_deterministic
from pretrain.models.vit import ViT
from pretrain.probe import finetuning, neighbors
from pretrain.probe.measure import probe
from pretrain.probe.settings import ProbeSettings

pytestmark = pytest.mark.cuda
NAMES = ["a", "b", "c", "d"]


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    set_deterministic(True)
    yield
    set_deterministic(False)


@pytest.mark.parametrize("relative", [False, True])
def test_probe_results_are_deterministic(tmp_path: Path, device: torch.device, relative: bool):
    write_classes(tmp_path / "train", NAMES, 6)
    write_classes(tmp_path / "val", NAMES, 4, first=100)
    torch.manual_seed(0)
    encoder = ViT("vit_tiny", 16, (4, 4), relative).eval()
    settings = ProbeSettings(k=5, attentive_steps=10, finetune_epochs=2)

    def sets() -> list[EvalLoader]:
        return [EvalLoader(load_samples(tmp_path / name), size=(64, 64), batch=16) for name in ("train", "val")]

    (train, val), on_cpu = sets(), torch.device("cpu")
    exact = probe(encoder, train, val, ProbeSettings(k=5, attentive_steps=0), device=on_cpu)
    first, again = (probe(encoder.to(device), *sets(), settings, device=device) for _ in range(2))
    assert first == again
    # cuBLAS and a CPU round differently, so one or two neighbors may differ.
    assert {name: first[name] for name in neighbors.METRICS} == pytest.approx(
        {name: exact[name] for name in neighbors.METRICS}, abs=0.2
    )
    images = dict(enumerate(next(train.batches()).images))
    labels = train.samples.label
    options = {"epochs": 2, "norm_after_pool": False, "device": device}
    tuned = [
        finetuning.finetune(encoder, images, torch.arange(16).numpy(), labels, len(NAMES), train, **options)
        for _ in range(2)
    ]
    for parameter, same in zip(tuned[0].parameters(), tuned[1].parameters(), strict=True):
        assert torch.equal(parameter, same)
