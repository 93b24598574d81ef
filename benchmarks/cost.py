"""What a training step of each method costs: multiply-adds counted, and the memory kept for the backward pass.

    python benchmarks/cost.py [--quick]

Nothing is timed. The forward pass is counted; the backward pass of matrix products costs twice as much, so a step's
ratios are the same (torch's counter counts the backward of a depth-wise convolution as a full one's). A teacher's
forward pass, which has no backward, counts as a third. Both are relative to the method without the add-on and are
printed next to PR-MIM's own figures (its Tables 2 and 4).
`--quick` counts a smaller encoder. The last line of the output is one JSON object.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.saved import saved_storages
from pretrain.build import build_ema, build_method
from pretrain.config import PretrainConfig, load
from pretrain.methods.base import Method
from pretrain.methods.lut import LUT

BATCH = 2
MAE, SIMMIM, LOMAR = "mae_vitb16_224_1600e", "simmim_vitb16_224_800e", "lomar_vitb16_224_400e"


@dataclass(frozen=True)
class Case:
    """A recipe with overrides, the case it is compared with, and the paper's ratios of FLOPs and memory to that one."""

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()
    base: str = ""
    paper: tuple[float, float] | None = None


CASES = [
    Case("MAE", MAE, base="MAE"),
    Case("MAE + PR 25 %", MAE, ("pr_mim.throw_ratio=0.25",), "MAE", (0.85, 0.81)),
    Case("MAE + PR 50 %", MAE, ("pr_mim.throw_ratio=0.5",), "MAE", (0.72, 0.64)),
    *(
        Case(f"MAE + PR 50 %, {kind}", MAE, ("pr_mim.throw_ratio=0.5", f"pr_mim.aggregation={kind}"), "MAE")
        for kind in ("average", "convnext", "transformer")
    ),
    Case("MAE + PR 65 %", MAE, ("pr_mim.throw_ratio=0.65",), "MAE", (0.64, 0.55)),
    Case("MAE, encoder_mask_tokens", MAE, ("method.encoder_mask_tokens=true",), "MAE"),
    Case("MAE + LUT", "lut_vitb16_224_1600e", base="MAE"),
    Case("SimMIM", SIMMIM, base="SimMIM"),
    Case("SimMIM + PR 30 %", SIMMIM, ("pr_mim.throw_ratio=0.3",), "SimMIM", (0.50, 0.61)),
    Case("LoMaR", LOMAR, base="LoMaR"),
    Case("LoMaR + PR 50 %", LOMAR, ("pr_mim.throw_ratio=0.5",), "LoMaR"),
    Case("LoMaR + LUT", "lut_lomar_vitb16_224_400e", base="LoMaR"),
    Case("LoMaR, late (block 8)", LOMAR, ("method.mask_token_block=8",), "LoMaR"),
    Case("LoMaR, asymmetric", LOMAR, ("method.architecture=asymmetric",), "LoMaR"),
    Case("LoMaR, late + PR 50 %", LOMAR, ("method.mask_token_block=8", "pr_mim.throw_ratio=0.5"), "LoMaR"),
]


def draw_batch(method: Method | LUT, config: PretrainConfig) -> tuple[Tensor, dict[str, Tensor]]:
    views = (len(config.augmentations),) if config.lut else ()
    images = torch.randint(0, 256, (BATCH, *views, *config.data.height_width, 3), dtype=torch.uint8)
    samples = [method.mask_sampler()(np.random.default_rng(i)) for i in range(BATCH)]
    return images, {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}


def count(case: Case, arch: str) -> dict[str, float]:
    """G multiply-adds of an image's forward pass, and MiB that it keeps for the backward."""
    overrides = ["data.shards=none", f"model.arch={arch}", *case.overrides]
    config = load(case.recipe, overrides)
    method = build_method(config)
    ema = build_ema(config, method, torch.device("cpu"))
    images, mask_indices = draw_batch(method, config)
    with FlopCounterMode(display=False) as without_backward:
        teacher_outputs = ema.model_inputs(images)
    with FlopCounterMode(display=False) as forward, saved_storages(method) as saved:
        loss = method(images, mask_indices, **teacher_outputs)["loss"]
    assert torch.isfinite(loss)
    flops = forward.get_total_flops() + without_backward.get_total_flops() / 3
    return {
        "forward_gmacs": flops / 2e9 / BATCH,
        "saved_mib": sum(saved.values()) / 2**20 / BATCH,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    arch = "vit_tiny" if parser.parse_args().quick else "vit_base"
    print(f"{'':28}{'forward':>9}{'kept':>9}{'forward':>9}{'kept':>8}{'paper':>15}")
    print(f"{arch + '/16, 224 px':28}{'G MAC':>9}{'MiB':>9}{'ratio':>9}{'ratio':>8}{'FLOPs  memory':>15}")
    results: dict[str, dict] = {}
    for case in CASES:
        counted = count(case, arch)
        base = results.get(case.base, counted)
        counted |= {f"{key}_ratio": counted[key] / base[key] for key in ("forward_gmacs", "saved_mib")}
        results[case.name] = {**asdict(case), **counted}
        paper = f"{case.paper[0]:.2f}    {case.paper[1]:.2f}" if case.paper else ""
        print(
            f"{case.name:28}{counted['forward_gmacs']:9.2f}{counted['saved_mib']:9.1f}"
            f"{counted['forward_gmacs_ratio']:9.2f}{counted['saved_mib_ratio']:8.2f}{paper:>15}",
            flush=True,
        )
    print(json.dumps({"arch": arch, "batch": BATCH, "cases": list(results.values())}))


if __name__ == "__main__":
    main()
