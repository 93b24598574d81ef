"""Measures everything that needs a GPU, in eight GPU minutes: ceilings, our kernels, training steps.

    python benchmarks/gpu.py OUT [--seconds 480] [--dry] [--resume] [--only NAME ...] [--lomar-path L] [--mae-path M]

The most decisive sections run first. A section that would not end before the deadline is left out, and a section that
fails does not affect the others; both are reported. OUT/gpu.json is updated after each. `--resume` runs what an earlier
call with the same OUT left out. `--only` runs the sections whose names contain one of the words. `--lomar-path` and
`--mae-path`, checkouts of the authors' code, are measured in the same run. `--dry` tries the command on a CPU, with
a tiny encoder and without the kernel, in under two minutes. The last line of the output is one JSON object.

It needs what `pretrain/run.py` needs, DeepSpeed included, and Triton.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.gpu_ceilings import attention_choice, ceilings, environment
from benchmarks.gpu_convolution import NAME as CONVOLUTION
from benchmarks.gpu_convolution import convolution
from benchmarks.gpu_engine import Run, engine
from benchmarks.gpu_goals import print_goals
from benchmarks.gpu_kernel import RIGHT, against_torch, right, sweep
from benchmarks.gpu_profile import profiled
from benchmarks.gpu_session import Session
from benchmarks.gpu_table import BF16, Cell, authors_cells, first_cells, further_cells, measure, second_cells
from pretrain.trainer.run_folder import RunFolder


class Section(NamedTuple):
    name: str
    kind: str  # sections of one kind take about the same time
    needs: float  # seconds
    run: Callable[[Session], None]


def cells(wanted: list[Cell], checkouts: dict[str, Path]) -> list[Section]:
    """Sections that fill cells of the table."""
    return [
        Section(
            cell.name,
            "compiled step" if cell.compiled else "step",
            45 if cell.compiled else 12,
            measure(cell, checkouts[cell.variant] if cell.column == "authors" else None),
        )
        for cell in wanted
    ]


def engine_sections(*runs: Run) -> list[Section]:
    """Sections of real runs."""
    return [Section(run.name, "engine with checkpoints" if run.saves else "engine", 100, engine(run)) for run in runs]


def sections(dry: bool, checkouts: dict[str, Path]) -> list[Section]:
    """All sections, the most decisive first."""
    profiles = [
        Section(f"profile: {cell.name}", "profile", 10, profiled(cell))
        for cell in (Cell("vit_base", 224, "fast", "now"), Cell("vit_huge", 224, "lomar", "now"))
    ]
    start = [
        Section("environment", "environment", 5, environment),
        Section("ceilings", "ceilings", 15, ceilings),
        Section("attention: torch's choice", "attention", 10, attention_choice),
        Section(CONVOLUTION, "convolution", 10, convolution),
        Section(RIGHT, "right", 50, right),
        Section("kernel: B, all 50 tokens", "kernel", 15, against_torch("B, all 50 tokens")),
    ]
    kernel = [
        Section(f"kernel: {name}", "kernel", 15, against_torch(name))
        for name in ("B, PR-MIM's 26", "B, visible 11", "L, all 50 tokens", "H, all 50 tokens")
    ]
    sweeps = [
        Section(f"kernel: sweep of {name}", "sweep", 60, sweep(name))
        for name in ("B, all 50 tokens", "H, all 50 tokens", "B, PR-MIM's 26", "B, visible 11")
    ]
    theirs = authors_cells(list(checkouts))
    if dry:
        tried = [*first_cells(), Cell("vit_base", 448, "fast", "now"), Cell("vit_base", 224, "lomar", BF16)]
        tried += theirs[: len(checkouts)]
        runs = engine_sections(Run("zero0", fast=True), Run("zero0", saves=True))
        return [*start, *kernel, *profiles, *sweeps, *cells(tried, checkouts), *runs]
    return [
        *start,
        *cells([*first_cells(), *theirs[: len(checkouts)]], checkouts),
        *kernel,
        *cells(second_cells(), checkouts),
        *profiles,
        *sweeps[:1],
        *engine_sections(
            Run("zero0", fast=True),
            Run("zero0", saves=True),
            Run("zero1"),
            Run("zero0", arch="vit_large", saves=True),
            Run("zero0", fast=True, cuda_graphs=False),
            Run("zero1", cuda_graphs=False),
        ),
        *sweeps[1:],
        *cells([*further_cells(), *theirs[len(checkouts) :]], checkouts),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME")
    for kind in ("lomar", "mae"):
        parser.add_argument(f"--{kind}-path", type=Path, metavar=kind[0].upper())
    arguments = parser.parse_args()
    if not arguments.dry and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --dry tries the command without one")
    paths = {"lomar": arguments.lomar_path, "mae": arguments.mae_path}
    # The runs of the `engine` sections reuse what is compiled here.
    RunFolder(Path(tempfile.gettempdir()) / "gpu_benchmark").cache_compiled()
    if arguments.dry:
        torch.set_num_threads(1)  # timings do not matter, and threads would wait for each other on a busy machine
    device = torch.device("cpu" if arguments.dry else "cuda")
    with Session(arguments.out, arguments.seconds, device, arguments.resume) as session:
        for section in sections(arguments.dry, {kind: path for kind, path in paths.items() if path}):
            if any(word in section.name for word in arguments.only):
                session.section(*section)
        if arguments.dry:
            session.say("this was a dry run: its figures are meaningless")
        goals = print_goals(session)
        failed = session.failed()
        session.say(f"sections that failed: {'; '.join(failed) or 'none'}")
    card = session.results.get("environment", {})
    print(json.dumps({**card, "dry": arguments.dry, "failed": failed, "goals": goals}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
