"""Does it help, and what does it cost? Small encoders pretrained by each method, then fine-tuned on few labels.

    python benchmarks/small_scale/run.py SHARDS OUT [--seeds 3] [--epochs 100] [--finetune-epochs 100] [--quick]
    python benchmarks/small_scale/run.py SHARDS|TAR OUT --gpu [--minutes 10] [--dry]

SHARDS holds three folders of shards, made of Caltech-101 by `python -m data.pack`: `all` (pretraining, labels unused),
`train` (30 images a class) and `val` (20 a class). Every variant is compared at equal epochs and at equal wall-clock,
that of LoMaR: the time of a step is measured first, for all of them one after the other, so that the machine may be
busy with other work later. Training from scratch and LoMaR run with all seeds, the others with the first. A command
that was interrupted continues where it stopped. The last line of the output is one JSON object.

`--gpu` is another experiment, sized for ten minutes of one GPU: see evidence.py. It packs a tar of photos by itself.
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

from pretrain.trainer.metrics import read_metrics

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SINCOS = ("model.position=sincos",)
DECODER = ("method.decoder_embed_dim=96", "method.decoder_depth=4", "method.decoder_num_heads=3")
# 32 of 36 patches; the paper: 196 of 196.
WINDOWS = ("method.name=lomar", "method.num_windows=2", "method.window_size=4")
LUT = ("lut.hidden_dim=512", "lut.alpha=1.0", "data.crop=simple")
PRETRAINED: dict[str, tuple[str, ...]] = {
    "MAE": ("method.name=mae", *DECODER, *SINCOS),
    "SimMIM": ("method.name=simmim", "method.mask_patch_size=16", *SINCOS),
    "LC-MAE": ("method.name=lc_mae", *DECODER, "method.decoder_depth=2", *SINCOS),
    "MAE + LUT": ("method.name=mae", *DECODER, *SINCOS, *LUT),
    "LoMaR": WINDOWS,
    "LoMaR + PR-MIM": (*WINDOWS, "pr_mim.throw_ratio=0.5", "pr_mim.kernel_size=3"),
    "LoMaR, late mask tokens": (*WINDOWS, "method.mask_token_block=8"),
}
REFERENCE = "LoMaR"
MAIN = ("from scratch", REFERENCE)  # with all seeds


def train(script: str, recipe: str, overrides: list[str], folder: Path) -> None:
    """One run, unless it is complete; its output goes to NAME.log in the same folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    processes = [] if torch.cuda.is_available() else ["--num_accelerators", "2"]
    command = ["deepspeed", *processes, script, str(HERE / recipe), f"runs={folder.parent}", f"name={folder.name}"]
    with folder.with_suffix(".log").open("w") as log:
        done = subprocess.run([*command, *overrides], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{' '.join([*command, *overrides])} failed: see {folder.with_suffix('.log')}")


def label(name: str) -> str:
    return re.sub("[^A-Za-z0-9]+", "_", name)


def time_step(name: str, options: argparse.Namespace) -> float:
    """Seconds of one step of pretraining: the median over an epoch of the small set, without its first logged steps."""
    folder = options.out / "speed" / label(name)
    overrides = [f"data.shards={options.shards}/train", "train.epochs=1", "optim.warmup_epochs=0", "log.every_steps=2"]
    train("pretrain/run.py", "pretrain.yaml", [*overrides, *PRETRAINED[name]], folder)
    return statistics.median(row["step_s"] for row in read_metrics(folder / "metrics.jsonl")[1:])


def measure(name: str, epochs: int, seed: int, step_s: float, options: argparse.Namespace) -> dict[str, Any]:
    """One variant with one seed: pretrained for some epochs, fine-tuned, tested."""
    run = f"{label(name)}-{epochs}-seed{seed}"
    start, minutes = ["model.position=relative", "optim.layer_decay=1.0"], 0.0
    if name in PRETRAINED:
        folder, variant = options.out / "pretrain" / run, PRETRAINED[name]
        length = [f"train.epochs={epochs}", f"optim.warmup_epochs={min(5, epochs / 10)}"]
        overrides = [f"data.shards={options.shards}/all", *length, f"seed={seed}", *variant]
        train("pretrain/run.py", "pretrain.yaml", overrides, folder)
        position = "sincos" if SINCOS[0] in variant else "relative"
        start = [f"start.checkpoint={folder}", f"model.position={position}"]
        minutes = read_metrics(folder / "metrics.jsonl")[-1]["step"] * step_s / 60
    folder = options.out / "finetune" / run
    shards = [f"data.shards={options.shards}/train", f"val.shards={options.shards}/val"]
    length = [f"train.epochs={options.finetune_epochs}", f"optim.warmup_epochs={min(5, options.finetune_epochs / 10)}"]
    train("downstream/classify/finetune.py", "finetune.yaml", [*shards, *length, *start, f"seed={seed}"], folder)
    top1 = read_metrics(folder / "evaluation.jsonl")[-1]["top1"]
    row = {"variant": name, "epochs": epochs, "seed": seed, "pretrain_minutes": minutes, "top1": top1}
    print(json.dumps(row), flush=True)
    return row


def report(results: list[dict[str, Any]]) -> None:
    """A Markdown table: mean and standard deviation over seeds."""
    print("| pretraining | epochs | minutes | top-1, % | seeds |\n|---|---|---|---|---|")
    for key in dict.fromkeys((row["variant"], row["epochs"]) for row in results):
        rows = [row for row in results if (row["variant"], row["epochs"]) == key]
        scores = [100 * row["top1"] for row in rows]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        minutes = statistics.mean(row["pretrain_minutes"] for row in rows)
        print(f"| {key[0]} | {key[1]} | {minutes:.1f} | {statistics.mean(scores):.1f}{spread} | {len(scores)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--finetune-epochs", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs of each: shows that it works")
    parser.add_argument("--gpu", action="store_true", help="a larger encoder for a set time on one GPU: evidence.py")
    parser.add_argument("--minutes", type=float, default=10, help="with --gpu: when it ends")
    parser.add_argument("--dry", action="store_true", help="with --gpu: tiny, on a CPU; shows that it works")
    options = parser.parse_args()
    options.shards, options.out = options.shards.absolute(), options.out.absolute()
    if options.gpu:
        import evidence  # imports all that trains

        evidence.run(options)
    if options.quick:
        options.seeds, options.epochs, options.finetune_epochs = 1, 2, 2
    step_s = {name: time_step(name, options) for name in PRETRAINED}
    print(json.dumps({"step_s": step_s}), flush=True)
    plan = [(name, options.epochs, seed) for seed in range(options.seeds) for name in MAIN]
    plan += [(name, options.epochs, 0) for name in PRETRAINED if name not in MAIN]
    same_time = {name: round(options.epochs * step_s[REFERENCE] / step_s[name]) for name in PRETRAINED}
    plan += [(name, epochs, 0) for name, epochs in same_time.items() if epochs != options.epochs]
    results = [measure(name, epochs, seed, step_s.get(name, 0.0), options) for name, epochs, seed in plan]
    report(results)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
