"""Counts what a training step of each method costs: multiply-adds, and memory kept for the backward pass.

    python benchmarks/cost.py [--quick]

Nothing is timed. The forward pass is counted as it runs on a GPU in bf16 (`fake_gpu.py`). The backward pass of matrix
products costs twice as much, so a step has the same ratios (torch's counter counts the backward pass of a depth-wise
convolution as a full convolution's). A teacher's forward pass, which has no backward, counts as a third.

Kept memory is counted twice if the window kernel applies. With torch's fused attention, relative position is a bias:
it is kept, along with a copy of the queries, the softmax sums, and one-hot positions if sequences differ. The kernel
keeps the linear layer's output as it is, and the tokens' int8 places, one set for all blocks. (A compiler makes its own
choice of what to keep and what to recompute; that is not counted.)

The first table shows each method relative to the one without the add-on, next to PR-MIM's own figures (its Tables 2
and 4). Two of these mean something else. With SimMIM and 30 % of all patches thrown, the encoder still processes 138 of
196 patches, 0.70 of its arithmetic; the paper's half is what throwing 50 % leaves. And PR-MIM does not count TEC's
frozen teacher, which is counted here.

The second table shows the fast recipes at every size, relative to LoMaR and to MAE. The last one counts the graphs that
torch.compile makes of the blocks; there are no graph breaks.
`--quick` counts a smaller encoder. The last line of the output is one JSON object.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from benchmarks.fake_gpu import count
from benchmarks.graphs import count_graphs
from pretrain.config import load
from pretrain.models.window_attention import MAX_WINDOW_SIZE

MAE, SIMMIM, LOMAR = "mae_vitb16_224_1600e", "simmim_vitb16_224_800e", "lomar_vitb16_224_400e"
MFF, LOCAL_MIM, LOCAL_MIM_PR = "mff_vitb16_224_800e", "local_mim_vitb16_224_1600e", "local_mim_pr_vitb16_224_100e"
TEC, CROSS_MAE, PIXIO = "tec_vitb16_224_300e", "crossmae_vitb16_224_800e", "pixio_vitb16_256_400e"
LOMAR_CROSS = "lomar_cross_vitb16_224_400e"
PR = "pr_mim.throw_ratio=0.5"
A_THIRD = "method.predict_ratio=0.25"  # a third of the masked patches, which are 75 or 80 % of all patches


@dataclass(frozen=True)
class Case:
    """A recipe with overrides, its base case, and the paper's ratios of FLOPs and memory to the base."""

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()
    base: str = ""
    paper: tuple[float, ...] | None = None  # only FLOPs if the paper does not report memory


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
    Case("MAE, 90 % masked, 1 block", MAE, ("method.mask_ratio=0.9", "method.decoder_depth=1"), "MAE"),
    Case("MAE + LUT", "lut_vitb16_224_1600e", base="MAE"),
    Case("SimMIM", SIMMIM, base="SimMIM"),
    Case("SimMIM + PR 30 %", SIMMIM, ("pr_mim.throw_ratio=0.3",), "SimMIM", (0.50, 0.61)),
    Case("SimMIM + PR 50 %", SIMMIM, (PR,), "SimMIM"),
    Case("MFF", MFF, base="MFF"),
    Case("MFF + PR 50 %", MFF, (PR,), "MFF", (0.73,)),
    Case("LocalMIM", LOCAL_MIM, base="LocalMIM"),
    Case("LocalMIM + PR 65 %", LOCAL_MIM_PR, (), "LocalMIM", (0.91,)),
    Case("LocalMIM, 448 px", LOCAL_MIM, ("data.image_size=448",), "LocalMIM"),
    Case("TEC, with its teacher", TEC, base="TEC, with its teacher"),
    Case("TEC + PR 50 %", TEC, (PR,), "TEC, with its teacher", (0.82,)),
    Case("CrossMAE", CROSS_MAE, base="CrossMAE"),
    Case("CrossMAE, a third predicted", CROSS_MAE, (A_THIRD,), "CrossMAE"),
    Case("Pixio, 256 px", PIXIO, ("model.registers=7",), "Pixio, 256 px"),
    Case("Pixio + PR 50 %", PIXIO, ("model.registers=7", PR), "Pixio, 256 px"),
    Case("LoMaR", LOMAR, base="LoMaR"),
    Case("LoMaR + PR 50 %", LOMAR, ("pr_mim.throw_ratio=0.5",), "LoMaR"),
    Case("LoMaR + LUT", "lut_lomar_vitb16_224_400e", base="LoMaR"),
    Case("LoMaR, late (block 8)", LOMAR, ("method.mask_token_block=8",), "LoMaR"),
    Case("LoMaR, asymmetric", LOMAR, ("method.architecture=asymmetric",), "LoMaR"),
    Case("LoMaR, cross decoder", LOMAR_CROSS, base="LoMaR"),
    Case("LoMaR, cross, 12 of 39", LOMAR_CROSS, (A_THIRD,), "LoMaR"),
    Case("LoMaR, multiscale", "lomar_multiscale_vitb16_224_400e", base="LoMaR"),
    Case("LoMaR, late + PR 50 %", LOMAR, ("method.mask_token_block=8", PR), "LoMaR"),
]


@dataclass(frozen=True)
class Scale:
    """An encoder at one image size, and the block where late mask tokens enter: two thirds of the depth."""

    encoder: str
    size: int
    num_windows: int
    mask_token_block: int
    lomar: str
    mae: str

    def cases(self) -> list[Case]:
        size = f"data.image_size={self.size}"
        windows, late = f"method.num_windows={self.num_windows}", f"method.mask_token_block={self.mask_token_block}"
        return [
            Case("MAE", self.mae, (size,)),
            Case("LoMaR", self.lomar, (size, windows)),
            Case("late", self.lomar, (size, windows, late)),
            Case("PR 50 %", self.lomar, (size, windows, PR)),
            Case("late + PR 50 %", self.lomar, (size, windows, late, PR)),
        ]


SCALES = [
    Scale(encoder, size, num_windows, block, lomar, mae)
    for encoder, block, lomar, mae, sizes in (
        ("ViT-B/16", 8, LOMAR, MAE, (224, 384, 448)),
        ("ViT-L/16", 16, "lomar_vitl16_224_1600e", "mae_vitl16_224_1600e", (224, 384, 448)),
        ("ViT-H/14", 21, "lomar_vith14_224_1600e", "mae_vith14_224_1600e", (224, 378, 448)),
    )
    for size, num_windows in zip(sizes, (4, 6, 9), strict=True)
]


def count_case(case: Case, arch: str = "") -> dict[str, float]:
    """G multiply-adds of an image's forward pass, and the MiB it keeps with torch's attention and with the kernel."""
    config = load(case.recipe, ["data.shards=none", *([f"model.arch={arch}"] if arch else []), *case.overrides])
    counted = count(config)
    rows, cols = config.method.sequence_grid(config.grid)
    kernel_serves = config.model.position == "relative" and rows == cols <= MAX_WINDOW_SIZE
    return {
        "forward_gmacs": counted.flops / 2e9,
        "saved_mib": counted.kept / 2**20,
        "saved_by_kernel_mib": (count(config, window_kernel=True) if kernel_serves else counted).kept / 2**20,
    }


def print_methods(arch: str) -> list[dict]:
    """Prints the first table; returns its rows."""
    print(f"{'':28}{'forward':>9}{'kept':>9}{'kernel':>9}{'forward':>9}{'kept':>8}{'paper':>10}")
    print(f"{arch + '/16, 224 px':28}{'G MAC':>9}{'MiB':>9}{'MiB':>9}{'ratio':>9}{'ratio':>8}   FLOPs   memory")
    results: dict[str, dict] = {}
    for case in progress(CASES):
        counted = count_case(case, arch)
        base = results.get(case.base, counted)
        ratios = {f"{key}_ratio": counted[key] / base[key] for key in ("forward_gmacs", "saved_mib")}
        results[case.name] = {**asdict(case), **counted, **ratios}
        paper = "".join(f"{ratio:<8.2f}" for ratio in case.paper or ())
        tqdm.write(
            f"{case.name:28}{counted['forward_gmacs']:9.2f}{counted['saved_mib']:9.1f}"
            f"{counted['saved_by_kernel_mib']:9.1f}{ratios['forward_gmacs_ratio']:9.2f}"
            f"{ratios['saved_mib_ratio']:8.2f}   {paper}"
        )
    return list(results.values())


def print_scales(scales: list[Scale], arch: str) -> list[dict]:
    """Prints the second table; returns its rows. Ratios of kept memory use the kernel if it applies."""
    print(f"\n{'':32}{'forward':>9}{'kept':>9}{'kernel':>9}{'of LoMaR':>16}{'of MAE':>16}")
    print(f"{'':32}{'G MAC':>9}{'MiB':>9}{'MiB':>9}{'FLOPs  kept':>16}{'FLOPs  kept':>16}")
    rows: list[dict] = []
    for scale in progress(scales):
        counted = {case.name: count_case(case, arch) for case in progress(scale.cases())}
        for name, cost in counted.items():
            ratios = {
                base: [cost[key] / counted[base][key] for key in ("forward_gmacs", "saved_by_kernel_mib")]
                for base in ("LoMaR", "MAE")
            }
            rows.append({"encoder": scale.encoder, "size": scale.size, "name": name, **cost, "ratios": ratios})
            tqdm.write(
                f"{f'{arch or scale.encoder} {scale.size} {name}':32}{cost['forward_gmacs']:9.2f}"
                f"{cost['saved_mib']:9.1f}{cost['saved_by_kernel_mib']:9.1f}"
                + "".join(f"{flops:10.2f}  {kept:.2f}" for flops, kept in ratios.values())
            )
    return rows


def print_graphs() -> dict[str, int]:
    """Prints and returns the second table's graph counts, which do not depend on the encoder's width."""
    graphs = {}
    for case in progress(SCALES[0].cases()):
        config = load(case.recipe, ["data.shards=none", "model.arch=vit_tiny", *case.overrides])
        graphs[case.name] = count_graphs(config)
    print("\ngraphs of the blocks:", ", ".join(f"{name} {number}" for name, number in graphs.items()))
    return graphs


def progress(cases: Iterable) -> Iterable:
    """A progress bar that disappears at the end."""
    return tqdm(cases, leave=False, disable=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    warnings.filterwarnings("ignore", message="CUDA is not available")  # a teacher's autocast
    arch = "vit_tiny" if quick else "vit_base"
    methods = print_methods(arch)
    scales = print_scales(SCALES[:1] if quick else SCALES, arch if quick else "")
    print(json.dumps({"arch": arch, "cases": methods, "fast": scales, "graphs": print_graphs()}))


if __name__ == "__main__":
    main()
