"""ViTDet's backbone at 1024 pixels: ours against the same one with attention written the usual way.

    python benchmarks/vitdet_backbone.py [--quick] [--arch vit_base]

The usual way pads the grid to whole windows and adds the relative position bias to a whole attention map: ViTDet's
decomposed bias, or LoMaR's gathered by bucket (padded keys are masked, or features would differ). Its MLPs are timm's;
everything else is shared. Both must give the same features and gradients before anything is timed. Repetitions
alternate (A B, then B A); times are medians, ratios are medians over pairs of neighboring steps. Memory is what is kept
for the backward pass, and the peak above the model alone; on a CPU, the resident memory of a process that takes one
step. `--quick` uses a smaller encoder and image. The last line of the output is one JSON object.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.saved import saved_storages
from downstream.dense.backbone.attention import DecomposedAttention, GridAttention
from downstream.dense.backbone.plain_vit import PlainViT
from pretrain.models.relative_position import NUM_BUCKETS, product_buckets

NAMES = ("ours", "usual")
MODES = ("forward", "both")


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    arch: str
    position: str
    precision: str
    size: int
    batch: int
    repetitions: int


def cases(quick: bool, arch: str | None, device: str) -> list[Case]:
    archs = [arch] if arch else ["vit_tiny"] if quick else ["vit_base", "vit_large"]
    size, repetitions = (512, 3) if quick else (1024, 20 if device == "cuda" else 2)
    batch = 4 if device == "cuda" else 1
    return [
        Case(name, position, precision, size, batch, repetitions)
        for name in archs
        for precision in (("bf16", "fp32") if quick else ("bf16",))
        for position in ("sincos", "relative")
    ]


class UsualAttention(nn.Module):
    """Attention as in ViTDet's public code: windows of a padded grid, and a whole attention map with the bias added."""

    def __init__(self, ours: GridAttention):
        super().__init__()
        self.heads, self.qkv, self.proj = ours.heads, ours.qkv, ours.proj
        self.decomposed = isinstance(ours, DecomposedAttention)
        if isinstance(ours, DecomposedAttention):
            self.rel_pos_h, self.rel_pos_w = ours.rel_pos_h, ours.rel_pos_w
        else:
            self.rpe_k = ours.rpe_k

    def forward(self, x: Tensor, grid: tuple[int, int], window: int) -> Tensor:
        B, (H, W), D = len(x), grid, x.shape[-1]
        x = x.unflatten(1, grid)
        if not window:
            return self._attend(x, None).flatten(1, 2)
        down, right = -H % window, -W % window
        x = F.pad(x, (0, 0, 0, right, 0, down))
        inside = F.pad(torch.ones(B, H, W, 1, dtype=torch.bool, device=x.device), (0, 0, 0, right, 0, down))
        x = self._attend(_partition(x, window), _partition(inside, window))
        x = x.view(B, (H + down) // window, (W + right) // window, window, window, D).transpose(2, 3)
        return x.reshape(B, H + down, W + right, D)[:, :H, :W].flatten(1, 2)

    def _attend(self, x: Tensor, inside: Tensor | None) -> Tensor:
        B, H, W, D = x.shape
        qkv = self.qkv(x).view(B, H * W, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, B * self.heads, H * W, -1).unbind(0)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        logits = self._add_decomposed(logits, q, H, W) if self.decomposed else self._add_bucketed(logits, q, H, W)
        if inside is not None:
            logits = logits.view(B, self.heads, H * W, H * W).masked_fill(~inside.view(B, 1, 1, H * W), -torch.inf)
        out = logits.softmax(-1).view(-1, H * W, H * W) @ v
        return self.proj(out.view(B, self.heads, H, W, -1).permute(0, 2, 3, 1, 4).reshape(B, H, W, D))

    def _add_decomposed(self, logits: Tensor, q: Tensor, H: int, W: int) -> Tensor:
        q = q.view(-1, H, W, q.shape[-1])
        rows, cols = torch.arange(H, device=q.device), torch.arange(W, device=q.device)
        rel_h = torch.einsum("bhwc,hkc->bhwk", q, self.rel_pos_h[rows[:, None] - rows + H - 1])
        rel_w = torch.einsum("bhwc,wkc->bhwk", q, self.rel_pos_w[cols[:, None] - cols + W - 1])
        whole = logits.view(-1, H, W, H, W) + rel_h[..., :, None] + rel_w[..., None, :]
        return whole.view_as(logits)

    def _add_bucketed(self, logits: Tensor, q: Tensor, H: int, W: int) -> Tensor:
        terms = q @ self.rpe_k.lookup_table_weight[0]
        rows = torch.arange(H, device=q.device).repeat_interleave(W)
        buckets = product_buckets(rows, torch.arange(W, device=q.device).repeat(H))
        at = torch.arange(H * W, device=q.device)[:, None] * NUM_BUCKETS + buckets  # iRPE's flat index
        return logits + terms.flatten(1)[:, at.flatten()].view_as(logits)


def _partition(x: Tensor, window: int) -> Tensor:
    B, H, W, D = x.shape
    x = x.view(B, H // window, window, W // window, window, D).transpose(2, 3)
    return x.reshape(-1, window, window, D)


def build(case: Case, device: str) -> dict[str, nn.Module]:
    """Builds both with equal weights; position tables that start at zero are randomized, so that a wrong bias shows."""
    torch.manual_seed(0)
    last = 23 if case.arch == "vit_large" else 11
    every = (last + 1) // 4
    ours = PlainViT(
        case.arch,
        img_size=case.size,
        position=case.position,
        global_blocks=range(every - 1, last + 1, every),
        out_indices=(last,),
        drop_path_rate=0.0,
    )
    for name, parameter in ours.named_parameters():
        if "rel_pos" in name or "rpe_k" in name:
            nn.init.normal_(parameter, std=0.02)
    usual = copy.deepcopy(ours)
    for block in usual.blocks:
        block.attn = UsualAttention(block.attn)
        mlp = timm.layers.Mlp(block.mlp.fc1.in_features, block.mlp.fc1.out_features)
        mlp.load_state_dict(block.mlp.state_dict())
        block.mlp = mlp
    return {"ours": ours.to(device), "usual": usual.to(device)}


def draw_images(case: Case, device: str) -> Tensor:
    return torch.randn(case.batch, 3, case.size, case.size, generator=torch.Generator().manual_seed(1)).to(device)


def features(model: nn.Module, images: Tensor, precision: str) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model(images)[0].float()


def step(model: nn.Module, images: Tensor, case: Case, mode: str) -> None:
    if mode == "forward":
        with torch.no_grad():
            features(model, images, case.precision)
    else:
        features(model, images, case.precision).square().mean().backward()
        model.zero_grad()


def assert_equal_models(models: dict[str, nn.Module], case: Case, device: str) -> None:
    """Asserts that features are equal up to rounding, and gradients have the same direction."""
    images = draw_images(case, device)
    weights = torch.randn(features(models["ours"], images[:1, :, :64, :64], "fp32").shape[1], device=device)
    found, gradients = {}, {}
    for name, model in models.items():
        out = features(model, images, case.precision)
        (out * weights[:, None, None]).mean().backward()
        found[name] = out.detach()
        gradients[name] = {key: p.grad for key, p in model.named_parameters()}
        model.zero_grad()
    tolerance, least = (1e-5, 0.9999) if case.precision == "fp32" else (2e-2, 0.98)
    difference = ((found["ours"] - found["usual"]).norm() / found["usual"].norm()).item()
    assert difference < tolerance, f"{case}: features differ by {difference}"
    for key, gradient in gradients["ours"].items():
        cosine = torch.cosine_similarity(gradient.flatten(), gradients["usual"][key].flatten(), dim=0).item()
        assert cosine > least, f"{case}: the gradients of {key} differ: cosine {cosine:.5f}"


def timed(models: dict[str, nn.Module], case: Case, device: str, mode: str, progress: tqdm) -> dict[str, list[float]]:
    """Seconds of each repetition; the comparison before serves as the warm-up."""
    images = draw_images(case, device)
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for repetition in range(case.repetitions):
        for name in NAMES if repetition % 2 else NAMES[::-1]:
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            step(models[name], images, case, mode)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
            progress.update()
    return seconds


def peak_mib(case: Case, name: str, device: str) -> float:
    """The peak memory of one step beyond weights and gradients."""
    model = build(case, device)[name]
    step(model, draw_images(case, device)[:, :, :64, :64], case, "both")  # makes libraries' one-time allocations
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    images = draw_images(case, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = psutil.Process().memory_info().rss
    features(model, images, case.precision).square().mean().backward()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_resident()
    return (peak - before) / 2**20


def peak_resident() -> int:
    """Peak resident bytes; `getrusage` would include a value inherited from the parent process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure(case: Case, device: str, progress: tqdm) -> dict:
    progress.set_description(f"{case.arch} {case.position} {case.precision}: peak")
    peak = {}
    for name in NAMES:
        command = [sys.executable, __file__, "--peak", json.dumps(asdict(case)), name]
        # Otherwise glibc keeps gigabytes of freed tensors of up to 32 MiB each, but none that are larger.
        alone = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=alone)
        peak[name] = float(done.stdout.split()[-1])
    progress.set_description(f"{case.arch} {case.position} {case.precision}: the same?")
    models = build(case, device)
    assert_equal_models(models, case, device)
    saved = {}
    for name, model in models.items():
        with saved_storages(model) as storages:
            out = features(model, draw_images(case, device), case.precision)
        del out
        saved[name] = sum(storages.values()) / 2**20
        storages.clear()
    progress.set_description(f"{case.arch} {case.position} {case.precision}")
    result = {**asdict(case), "kept_mib": saved, "peak_mib": peak}
    for mode in MODES:
        seconds = timed(models, case, device, mode, progress)
        result[mode] = {
            "seconds": {name: statistics.median(values) for name, values in seconds.items()},
            "speedup": statistics.median(b / a for a, b in zip(*seconds.values(), strict=True)),
        }
    return result


def table(results: list[dict]) -> str:
    head = ("encoder", "position", "", "px", "s fwd", "usual", "ratio", "s both", "usual", "ratio")
    head = (*head, "kept MiB", "usual", "ratio", "peak MiB", "usual", "ratio")
    rows = [head]
    for r in results:
        row = [r["arch"], r["position"], r["precision"], str(r["size"])]
        for mode in MODES:
            seconds = r[mode]["seconds"]
            row += [f"{seconds['ours']:.2f}", f"{seconds['usual']:.2f}", f"{r[mode]['speedup']:.2f}"]
        for kind in ("kept_mib", "peak_mib"):
            ours, usual = r[kind]["ours"], r[kind]["usual"]
            row += [f"{ours:.0f}", f"{usual:.0f}", f"{usual / ours:.2f}"]
        rows.append(tuple(row))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--arch", help="one encoder only")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.peak:
        print(peak_mib(Case(**json.loads(arguments.peak[0])), arguments.peak[1], device))
        return
    todo = cases(arguments.quick, arguments.arch, device)
    with tqdm(total=sum(4 * case.repetitions for case in todo), unit="step") as progress:
        results = [measure(case, device, progress) for case in todo]
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    print(f"device: {device} ({name}), torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("seconds of a batch, forward alone and with the backward pass; MiB kept for the backward pass, and peak")
    print(table(results))
    print(json.dumps({"device": name, "torch": torch.__version__, "quick": arguments.quick, "results": results}))


if __name__ == "__main__":
    main()
