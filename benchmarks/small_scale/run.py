"""Does it help, and what does it cost? Small encoders pretrained by each method, then fine-tuned on few labels.

    python benchmarks/small_scale/run.py SHARDS OUT [--seeds 3] [--epochs 100] [--finetune-epochs 100] [--quick]

SHARDS holds three folders of shards that `python -m data.pack` made of Caltech-101: `all` (pretraining, labels unused),
`train` (30 images a class) and `val` (20 a class). Every variant is compared at equal epochs and at equal wall-clock,
that of LoMaR. A command that was interrupted continues where it was. The last line of the output is one JSON object.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from pretrain.metrics import read_metrics

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SINCOS = ("model.position=sincos",)
DECODER = ("method.decoder_dim=96", "method.decoder_depth=4", "method.decoder_heads=3")
WINDOWS = ("method.name=lomar", "method.windows=4", "method.window=5")
LUT = ("context.hidden=512", "context.alpha=1.0", "data.crop=simple")
VARIANTS: dict[str, tuple[str, ...] | None] = {
    "from scratch": None,
    "MAE": ("method.name=mae", *DECODER, *SINCOS),
    "SimMIM": ("method.name=simmim", "method.cell=16", *SINCOS),
    "LC-MAE": ("method.name=lc_mae", *DECODER, "method.decoder_depth=2", *SINCOS),
    "MAE + LUT": ("method.name=mae", *DECODER, *SINCOS, *LUT),
    "LoMaR": WINDOWS,
    "LoMaR + PR-MIM": (*WINDOWS, "partial.throw=0.5", "partial.kernel=5"),
    "LoMaR, late mask tokens": (*WINDOWS, "method.join=8"),
}
REFERENCE = "LoMaR"


def train(script: str, recipe: str, overrides: list[str], folder: Path) -> None:
    """One run, unless it is complete; its output goes to a file beside it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    processes = [] if torch.cuda.is_available() else ["--num_accelerators", "2"]
    command = ["deepspeed", *processes, script, str(HERE / recipe), f"runs={folder.parent}", f"name={folder.name}"]
    with folder.with_suffix(".log").open("w") as log:
        done = subprocess.run([*command, *overrides], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{' '.join([*command, *overrides])} failed: see {folder.with_suffix('.log')}")


def seconds(folder: Path) -> float:
    """The time that the steps of a run took."""
    rows = read_metrics(folder / "metrics.jsonl")
    steps = [row["step"] - before for row, before in zip(rows, [0, *(row["step"] for row in rows)], strict=False)]
    return sum(row["step_s"] * count for row, count in zip(rows, steps, strict=True))


def measure(name: str, epochs: int, seed: int, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """One variant with one seed: pretrained for some epochs, fine-tuned, tested."""
    label = f"{re.sub('[^A-Za-z0-9]+', '_', name)}-{epochs}-seed{seed}"
    variant, start, spent = VARIANTS[name], ["model.position=relative"], 0.0
    if variant is not None:
        folder = out / "pretrain" / label
        warmup = min(5, epochs / 10)
        common = [f"data.shards={options.shards}/all", f"train.epochs={epochs}", f"optim.warmup_epochs={warmup}"]
        train("pretrain/run.py", "pretrain.yaml", [*common, f"seed={seed}", *variant], folder)
        position = "sincos" if SINCOS[0] in variant else "relative"
        start, spent = [f"start.checkpoint={folder}", f"model.position={position}"], seconds(folder)
    folder = out / "finetune" / label
    shards = [f"data.shards={options.shards}/train", f"val.shards={options.shards}/val"]
    length = [f"train.epochs={options.finetune_epochs}", f"optim.warmup_epochs={min(5, options.finetune_epochs / 10)}"]
    decay = [] if variant is not None else ["optim.layer_decay=1.0"]
    train("downstream/classify/run.py", "finetune.yaml", [*shards, *length, *start, *decay, f"seed={seed}"], folder)
    top1 = read_metrics(folder / "evaluation.jsonl")[-1]["top1"]
    return {"variant": name, "epochs": epochs, "seed": seed, "pretrain_s": spent, "top1": top1}


def report(results: list[dict[str, Any]]) -> None:
    """A Markdown table: mean and standard deviation over seeds."""
    print("| pretraining | epochs | minutes | top-1, % | seeds |\n|---|---|---|---|---|")
    for key in dict.fromkeys((row["variant"], row["epochs"]) for row in results):
        rows = [row for row in results if (row["variant"], row["epochs"]) == key]
        scores = [100 * row["top1"] for row in rows]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        minutes = statistics.mean(row["pretrain_s"] for row in rows) / 60
        print(f"| {key[0]} | {key[1]} | {minutes:.1f} | {statistics.mean(scores):.1f}{spread} | {len(scores)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--finetune-epochs", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs of each: shows that it works")
    options = parser.parse_args()
    options.shards, out = options.shards.absolute(), options.out.absolute()
    if options.quick:
        options.seeds, options.epochs, options.finetune_epochs = 1, 2, 2
    results = []
    for seed in range(options.seeds):
        for name in VARIANTS:
            results.append(measure(name, options.epochs, seed, options, out))
            print(json.dumps(results[-1]), flush=True)
    reference = statistics.mean(row["pretrain_s"] for row in results if row["variant"] == REFERENCE)
    for name, variant in VARIANTS.items():
        spent = statistics.mean(row["pretrain_s"] for row in results if row["variant"] == name)
        epochs = round(options.epochs * reference / spent) if variant is not None else 0
        for seed in range(options.seeds) if epochs not in (0, options.epochs) else ():
            results.append(measure(name, epochs, seed, options, out))
            print(json.dumps(results[-1]), flush=True)
    report(results)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
