"""Images per second of a LoMaR training step: ours against `naive_lomar.py`, both in plain PyTorch.

    python benchmarks/lomar_step.py [--quick]

A step is forward, backward and AdamW. Both models hold equal weights and get equal batches; before anything is timed
they must give the same loss and gradients. Repetitions alternate (A B, then B A), so that a slowdown of the machine
affects both; the rates are medians, the ratio is the median over pairs of neighboring steps. The last line of the
output is one JSON object.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.naive_lomar import NaiveLoMaR
from benchmarks.saved import saved_storages
from pretrain.methods.lomar import LoMaR
from pretrain.methods.targets import PixelsConfig, build_target
from pretrain.models.vit import ViT
from pretrain.trainer.optim import parameter_groups

PATCH_SIZE = 16
NAMES = ("ours", "naive")
Batch = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """One row of the table; 4 windows of 7x7 patches at 224, 9 at 448."""

    arch: str
    size: int
    precision: str
    batch: int
    repetitions: int

    @property
    def num_windows(self) -> int:
        return {224: 4, 448: 9}[self.size]


def cases(quick: bool, device: str) -> list[Case]:
    """A CPU gets a batch that it can finish; `quick` a smaller encoder as well."""
    arch = "vit_small" if quick else "vit_base"
    batch = {224: 128, 448: 64} if device == "cuda" else {224: 2, 448: 1} if quick else {224: 8, 448: 4}
    repetitions = 3 if quick else 20 if device == "cuda" else 6
    return [Case(arch, size, kind, batch[size], repetitions) for kind in ("bf16", "fp32") for size in (224, 448)]


def build(case: Case, device: str) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    grid = (case.size // PATCH_SIZE, case.size // PATCH_SIZE)
    target = build_target(PixelsConfig(), grid, PATCH_SIZE)
    ours = LoMaR(LoMaR.Config(num_windows=case.num_windows), ViT(case.arch, PATCH_SIZE, grid), target)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lookup_table" in name:  # zero at first, which would hide a wrong bias
                parameter.normal_(std=0.02)
    return {"ours": ours.to(device), "naive": NaiveLoMaR.like(ours).to(device)}


def draw_batch(case: Case, ours: LoMaR, device: str) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (case.batch, case.size, case.size, 3), generator=generator, dtype=torch.uint8)
    sampler = ours.mask_sampler()
    samples = [sampler(np.random.default_rng(i)) for i in range(case.batch)]
    mask_indices = {
        name: torch.from_numpy(np.stack([sample[name] for sample in samples])).to(device) for name in samples[0]
    }
    return images.to(device), mask_indices


def forward(model: nn.Module, batch: Batch, case: Case) -> Tensor:
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=case.precision == "bf16"):
        return model(*batch)["loss"]


def assert_equal_models(models: dict[str, nn.Module], batch: Batch, case: Case) -> dict[str, float]:
    """The honesty check: the same loss to rounding and gradients in the same direction."""
    losses, gradients = {}, {}
    for name, model in models.items():
        loss = forward(model, batch, case)
        loss.backward()
        losses[name] = loss.item()
        gradients[name] = {key.removeprefix("predictor."): p.grad for key, p in model.named_parameters()}
        model.zero_grad()
    tolerance, least = (1e-5, 0.9999) if case.precision == "fp32" else (5e-3, 0.98)
    difference = abs(losses["ours"] - losses["naive"]) / losses["naive"]
    assert difference < tolerance, f"{case}: losses differ: {losses}"
    for key, gradient in gradients["ours"].items():
        cosine = torch.cosine_similarity(gradient.flatten(), gradients["naive"][key].flatten(), dim=0).item()
        assert cosine > least, f"{case}: the gradients of {key} differ: cosine {cosine:.5f}"
    return losses


def saved_mib(model: nn.Module, batch: Batch, case: Case) -> float:
    """What a forward pass keeps for the backward pass, without the weights."""
    with saved_storages(model) as saved:
        loss = forward(model, batch, case)
    del loss
    return sum(saved.values()) / 2**20


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed_steps(
    models: dict[str, nn.Module], batch: Batch, case: Case, device: str
) -> Iterator[tuple[str, float, float]]:
    """Yields name, seconds and peak MiB of each step, the first of each model being a warm-up."""
    optimizers = {name: torch.optim.AdamW(parameter_groups(m, 0.05), lr=1e-5) for name, m in models.items()}
    for repetition in range(case.repetitions + 1):
        for name in NAMES if repetition % 2 else NAMES[::-1]:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            synchronize(device)
            start = time.perf_counter()
            forward(models[name], batch, case).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            synchronize(device)
            seconds = time.perf_counter() - start
            yield name, seconds, torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0


def measure(case: Case, device: str, progress: tqdm) -> dict[str, object]:
    progress.set_description(f"{case.arch} {case.size} {case.precision}: same loss?")
    models = build(case, device)
    batch = draw_batch(case, models["ours"], device)
    losses = assert_equal_models(models, batch, case)
    saved = {name: saved_mib(model, batch, case) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    peak = dict.fromkeys(NAMES, 0.0)
    progress.set_description(f"{case.arch} {case.size} {case.precision}")
    for name, elapsed, memory in timed_steps(models, batch, case, device):
        seconds[name].append(elapsed)
        peak[name] = max(peak[name], memory)
        progress.update()
    rate = {name: case.batch / statistics.median(seconds[name][1:]) for name in NAMES}
    pairs = [naive / ours for ours, naive in zip(seconds["ours"][1:], seconds["naive"][1:], strict=True)]
    return {
        **asdict(case),
        "windows": case.num_windows,
        "loss": losses,
        "images_per_second": rate,
        "speedup": statistics.median(pairs),
        "saved_for_backward_mib": saved,
        # Both models and optimizers live on the device, so only differences of the peaks mean something.
        **({"cuda_peak_mib": peak} if device == "cuda" else {}),
    }


def table(results: list[dict]) -> str:
    lines = [
        f"{'encoder':10} {'size':>4} {'windows':>7} {'precision':>9} {'batch':>5} {'ours':>9} {'naive':>9} {'ratio':>6}"
        f" {'ours MiB':>9} {'naive MiB':>9}"
    ]
    for r in results:
        rate, saved = r["images_per_second"], r["saved_for_backward_mib"]
        lines.append(
            f"{r['arch']:10} {r['size']:4} {r['windows']:7} {r['precision']:>9} {r['batch']:5} {rate['ours']:9.2f} "
            f"{rate['naive']:9.2f} {r['speedup']:6.2f} {saved['ours']:9.0f} {saved['naive']:9.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ViT-S and few repetitions: under a minute on two cores")
    quick = parser.parse_args().quick
    device = "cuda" if torch.cuda.is_available() else "cpu"
    todo = cases(quick, device)
    with tqdm(total=sum(2 * (case.repetitions + 1) for case in todo), unit="step") as progress:
        results = [measure(case, device, progress) for case in todo]
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    print(f"device: {device} ({name}), torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("images/s of a training step, medians; MiB: activations kept for the backward pass")
    print(table(results))
    print(json.dumps({"device": name, "torch": torch.__version__, "quick": quick, "results": results}))


if __name__ == "__main__":
    main()
