"""Images per second of a training step: LoMaR, its fast variants and MAE, in plain PyTorch, on the CPU.

    python benchmarks/step.py [--quick] [--lomar-path LoMaR] [--mae-path mae]

A step is forward, backward and AdamW, in bf16 autocast (in fp32 on a CPU that is slow in bf16), of ViT-B/16 at 224
pixels (batch 8) and at 448 (batch 2). All models train in one process, in turn; the order is reversed in every other
round. The rates are medians over rounds. A ratio is the median of the ratios within a round, so that a slowdown of the
machine affects both sides; next to it is the ratio of the counted FLOPs. `naive` is plain LoMaR as a first research
implementation would write it (naive_lomar.py); before anything is timed, it must give the same loss and gradients as
ours.

MAE is this project's. On a CPU its attention consists of matrix products; on a GPU, where `benchmarks/gpu.py` measures,
it is torch's fused attention. Given paths to the authors' checkouts, their code is timed in the same rounds; the blocks
of their MAE are timm's, with fused attention.

`--quick` uses ViT-S and takes under two minutes; its MAE has a decoder larger than its encoder. The last line of the
output is one JSON object.
"""

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

from benchmarks.authors import authors_trainee
from benchmarks.naive_lomar import NaiveLoMaR, assert_equal_steps, randomize_tables
from benchmarks.variants import NAMES, Trainee, build, draw_batch, load_variant, trainee
from pretrain.methods.lomar import LoMaR
from pretrain.trainer.cautions import has_fast_bf16
from pretrain.trainer.optim import build_adamw, parameter_groups

CPU = torch.device("cpu")
ROWS = {**NAMES, "naive": "LoMaR, naive", "authors_lomar": "authors' LoMaR", "authors_mae": "authors' MAE, fused"}
BASES = ("lomar", "mae")


@dataclass(frozen=True)
class Case:
    """The steps at one image size."""

    arch: str
    size: int
    batch: int
    rounds: int


def cases(quick: bool) -> list[Case]:
    if quick:
        return [Case("vit_small", 224, 2, 3), Case("vit_small", 448, 1, 3)]
    return [Case("vit_base", 224, 8, 10), Case("vit_base", 448, 2, 10)]


def naive_trainee(case: Case) -> Trainee:
    """Plain LoMaR's naive implementation, after comparing its loss and gradients with ours on one batch."""
    config = load_variant("lomar", case.arch, case.size)
    ours = build(config, CPU)
    assert isinstance(ours, LoMaR)
    randomize_tables(ours)
    naive, batch = NaiveLoMaR.like(ours), draw_batch(ours, config, case.batch)
    assert_equal_steps(ours, naive, batch, bf16=has_fast_bf16(CPU))
    optimizer = build_adamw(parameter_groups(naive, config.optim.weight_decay), config, stage=1)
    return Trainee(naive, lambda: naive(*batch)["loss"], optimizer, case.batch, CPU)


def trainees(case: Case, checkouts: dict[str, Path]) -> dict[str, Trainee]:
    """The models to compare, by the keys of `ROWS`."""
    ours = {name: trainee(load_variant(name, case.arch, case.size), case.batch, CPU) for name in NAMES}
    theirs = {
        f"authors_{kind}": authors_trainee(kind, path, case.arch, case.size, case.batch, CPU)
        for kind, path in checkouts.items()
    }
    return {**ours, "naive": naive_trainee(case), **theirs}


def timed_steps(models: dict[str, Trainee], rounds: int) -> Iterator[tuple[int, str, float]]:
    """Yields round, name and seconds of each step; round 0 is a warm-up."""
    for number in range(rounds + 1):
        for name in list(models) if number % 2 else reversed(models):
            start = time.perf_counter()
            models[name].step()
            yield number, name, time.perf_counter() - start


def measure(case: Case, checkouts: dict[str, Path], progress: tqdm) -> dict:
    """Rates, their ratios to each base with quartiles, and the ratios of FLOPs."""
    progress.set_description(f"{case.size} px: models")
    models = trainees(case, checkouts)
    flops = {name: model.forward_flops() for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    progress.set_description(f"{case.size} px")
    for number, name, elapsed in timed_steps(models, case.rounds):
        if number:
            seconds[name].append(elapsed)
        progress.update()
    result: dict = {
        **asdict(case),
        "images_per_s": {name: case.batch / statistics.median(values) for name, values in seconds.items()},
        "step_gflops_per_image": {name: 3 * value / 1e9 for name, value in flops.items()},
        "ratios": {},
        "quartiles": {},
        "arithmetic": {},
    }
    for name, base in itertools.product(models, BASES):
        if name != base:
            key = f"{name}_over_{base}_{case.size}"
            within_rounds = [b / a for a, b in zip(seconds[name], seconds[base], strict=True)]
            low, middle, high = statistics.quantiles(within_rounds, n=4, method="inclusive")
            result["ratios"][key], result["quartiles"][key] = round(middle, 3), (round(low, 3), round(high, 3))
            result["arithmetic"][key] = round(flops[base] / flops[name], 3)
    return result


def table(results: list[dict]) -> str:
    lines = []
    for r in results:
        lines.append(
            f"{r['arch']}/16, {r['size']} px, batch {r['batch']:<4}{'images/s':>12}{'/ LoMaR':>10}{'by FLOPs':>10}"
            f"{'/ MAE':>10}{'by FLOPs':>10}{'GFLOP':>10}"
        )
        for name, rate in r["images_per_s"].items():
            keys = [f"{name}_over_{base}_{r['size']}" for base in BASES]
            ratios = "".join(f"{r['ratios'].get(key, 1):10.2f}{r['arithmetic'].get(key, 1):10.2f}" for key in keys)
            lines.append(f"{ROWS[name]:32}{rate:10.2f}{ratios}{r['step_gflops_per_image'][name]:10.1f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    for kind in ("lomar", "mae"):
        parser.add_argument(f"--{kind}-path", type=Path, help=f"a checkout of the authors' {kind}")
    arguments = parser.parse_args()
    paths = {"lomar": arguments.lomar_path, "mae": arguments.mae_path}
    checkouts = {kind: path for kind, path in paths.items() if path}
    todo = cases(arguments.quick)
    steps = sum((case.rounds + 1) * (len(NAMES) + 1 + len(checkouts)) for case in todo)
    with tqdm(total=steps, unit="step") as progress:
        results = [measure(case, checkouts, progress) for case in todo]
    threads = torch.get_num_threads()
    precision = "bf16" if has_fast_bf16(CPU) else "fp32"
    print(f"{platform.machine()}, {threads} threads, {precision}, torch {torch.__version__}; GFLOP: per image and step")
    print(table(results))
    summary = {key: value for result in results for key, value in result["ratios"].items()}
    device = {"device": platform.machine(), "threads": threads, "precision": precision, "torch": torch.__version__}
    print(json.dumps({**summary, **device, "quick": arguments.quick, "cases": results}))


if __name__ == "__main__":
    main()
