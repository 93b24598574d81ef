"""Training steps on one GPU: encoders x sizes x variants, before kernel, compiler and fused AdamW, and now.

A step is forward, backward and AdamW on one batch that stays on the GPU, in plain PyTorch. MFU is three times the
counted FLOPs of a forward pass over 989 TFLOP/s, an H100's dense bf16 peak. "MAE" is ours with torch's fastest fused
attention, whose backward pass may give different bits each time, except in the column "now, deterministic".
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.authors import authors_trainee
from benchmarks.gpu_kernel import is_wrong
from benchmarks.gpu_session import Session, free_memory, median_ms
from benchmarks.variants import image_side, load_variant, trainee
from pretrain.numerics import choose_numerics

PEAK_FLOPS = 989e12
# The micro-batches of the recipes.
IMAGES = {
    ("vit_base", 224): 256, ("vit_base", 384): 128, ("vit_base", 448): 128,
    ("vit_large", 224): 128, ("vit_large", 384): 64, ("vit_large", 448): 64,
    ("vit_huge", 224): 64, ("vit_huge", 384): 32, ("vit_huge", 448): 32,
}  # fmt: skip
BF16, SDPA = "now, bf16 residual", "now, without the kernel"
ONE_BY_ONE = "now, without CUDA graphs"
BEFORE = ("model.attention=sdpa", "model.compile=off", "train.deterministic=false")
# The keys of each column, added to those of every LoMaR or MAE.
COLUMNS = {
    "before": BEFORE,
    "now": (),
    BF16: ("model.residual=bf16",),
    SDPA: ("model.attention=sdpa",),
    ONE_BY_ONE: ("model.cuda_graphs=off",),
    "now, deterministic": ("train.deterministic=true",),
    "now, not deterministic": ("train.deterministic=false",),
    "authors": (),
}


@dataclass(frozen=True)
class Cell:
    """One number of the table; `variant` is a key of `variants.NAMES`, `column` of `COLUMNS`."""

    arch: str
    size: int
    variant: str
    column: str

    @property
    def name(self) -> str:
        return f"{self.arch} {self.size} {self.variant}, {self.column}"

    @property
    def compiled(self) -> bool:
        return self.column.startswith("now")

    def overrides(self, session: Session) -> tuple[str, ...]:
        keys = ["train.deterministic=false"] if self.variant == "mae" else []
        if self.compiled and is_wrong(session):
            keys.append("model.attention=sdpa")  # the speed of a wrong kernel is meaningless
        return (*keys, *COLUMNS[self.column])


def _both(arch: str, size: int, *variants: str) -> list[Cell]:
    return [Cell(arch, size, variant, column) for variant in variants for column in ("now", ONE_BY_ONE, "before")]


def first_cells() -> list[Cell]:
    """The most decisive cells."""
    return [
        *_both("vit_base", 224, "lomar", "fast", "mae"),
        Cell("vit_base", 224, "lomar", SDPA),
    ]


def second_cells() -> list[Cell]:
    cells = [
        ("vit_large", 224, "lomar"),
        ("vit_base", 448, "fast"),
        ("vit_base", 448, "mae"),
        ("vit_huge", 224, "lomar"),
        ("vit_large", 224, "fast"),
        ("vit_large", 224, "mae"),
    ]
    return [Cell(*cell, column) for column in ("now", ONE_BY_ONE, "before") for cell in cells]


def further_cells() -> list[Cell]:
    """The rest of the table, the most wanted first, without `first_cells` and `second_cells`."""
    wanted = [
        Cell("vit_base", 224, "lomar", BF16),
        Cell("vit_large", 224, "lomar", BF16),
        Cell("vit_base", 224, "fast", "now, not deterministic"),
        *_both("vit_base", 384, "fast", "mae"),
        *_both("vit_base", 224, "late", "pr"),
        Cell("vit_base", 224, "pr", SDPA),
        Cell("vit_base", 224, "mae", "now, deterministic"),
        *_both("vit_large", 448, "fast", "mae"),
        *_both("vit_large", 384, "fast", "mae"),
        *_both("vit_huge", 224, "fast", "mae"),
    ]
    for arch, size in IMAGES:
        wanted += _both(arch, size, "lomar", "late", "pr", "fast", "mae")
    earlier = {*first_cells(), *second_cells()}
    return [cell for cell in dict.fromkeys(wanted) if cell not in earlier]


def authors_cells(kinds: list[str]) -> list[Cell]:
    return [Cell(arch, size, kind, "authors") for arch, size in IMAGES for kind in kinds]


def measure(cell: Cell, checkout: Path | None = None) -> Callable[[Session], None]:
    """The section that fills a cell; `checkout` is the authors' code, for their column."""

    def section(session: Session) -> None:
        arch, images = (cell.arch, IMAGES[cell.arch, cell.size]) if not session.dry else ("vit_tiny", 1)
        flops = _forward_flops(arch, cell.size, cell.variant, session)
        while True:
            try:
                row = _measure(cell, arch, images, checkout, session)
                break
            except torch.OutOfMemoryError:
                if images == 1:
                    raise
            images //= 2
            free_memory()
            session.say(f"{cell.name}: out of memory; retrying with {images} images")
        speed = 3 * flops * row["images_per_s"]
        row |= {**asdict(cell), "side": image_side(arch, cell.size), "tflops": speed / 1e12, "mfu": speed / PEAK_FLOPS}
        session.keep("cells", session.table("cells") | {cell.name: row})
        session.say(
            f"{cell.name:44}{row['images']:4} images {row['ms']:8.1f} ms {row['images_per_s']:8.0f} images/s"
            f"  MFU {100 * row['mfu']:4.1f} %  {row['peak_gib']:5.1f} GiB  first step {row['first_step_s']:.0f} s"
        )

    return section


def _forward_flops(arch: str, size: int, variant: str, session: Session) -> float:
    """FLOPs of one image, counted without kernel and compiler, once per encoder, size and variant."""
    known, key = session.table("forward_flops"), f"{arch} {size} {variant}"
    if key not in known:
        config = load_variant(variant, arch, size, *BEFORE)
        known[key] = trainee(config, 1, session.device).forward_flops()
        free_memory()
    return known[key]


def _measure(cell: Cell, arch: str, images: int, checkout: Path | None, session: Session) -> dict[str, Any]:
    """Times a step; the model is released when it returns."""
    device, numerics = session.device, "the authors'"
    torch._dynamo.reset()
    if checkout is not None:
        model = authors_trainee(cell.variant, checkout, arch, cell.size, images, device)
    else:
        config = load_variant(cell.variant, arch, cell.size, *cell.overrides(session))
        model = trainee(config, images, device, fused=cell.column != "before")
        numerics = str(choose_numerics(config, device, stage=0))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - start
    ms = median_ms(model.step, device, repetitions=2 if session.dry else 10, warmup=0 if session.dry else 3)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    loss = float(model.autocast_loss().detach())
    assert loss == loss, f"{cell.name}: the loss is not a number"
    return {
        "images": images,
        "ms": ms,
        "images_per_s": images / ms * 1e3,
        "peak_gib": peak / 2**30,
        "first_step_s": first,
        "loss": loss,
        "numerics": numerics,
    }
