"""The planner against steps measured on a GPU, from `results/`, written by gpu.py."""

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_table import IMAGES
from benchmarks.variants import load_variant
from pretrain.plan.estimate import choose_numerics, shipped_zero
from pretrain.plan.hardware import build_cluster
from pretrain.plan.step_time import step_time
from pretrain.plan.trace import trace_method

RESULTS = Path(__file__).parent / "results"


def planned_steps(gpu: str) -> Iterator[tuple[str, float, float]]:
    """Yields each cell's name and the milliseconds of its step, measured and planned."""
    for name, cell in json.loads((RESULTS / f"{gpu}.json").read_text())["cells"].items():
        (arch, size, variant), column = name.split(", ", 1)[0].split(), name.split(", ", 1)[1]
        if column == "now" and cell["images"] == IMAGES[arch, int(size)]:
            yield name, cell["ms"], 1e3 * _planned(gpu, arch, int(size), variant)


def _planned(gpu: str, arch: str, size: int, variant: str) -> float:
    images, cluster = IMAGES[arch, size], build_cluster(gpu, 1)
    batch = (f"train.global_batch_size={images}", "train.gradient_accumulation_steps=1", "data.num_workers=64")
    config = load_variant(variant, arch, size, *batch)
    numerics = choose_numerics(config, cluster)
    return step_time(config, cluster, numerics, shipped_zero(0), trace_method(config), images)[0].total
