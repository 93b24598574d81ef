"""The experiment of `run.py --gpu`: ten minutes on one GPU, where every variant gets the same time.

It trains ViT-S/8 on Caltech-101 at 112 pixels: 14x14 patches, so windows, masks and tokens are those of 16-pixel
patches at 224. The photos have at most 176 pixels per side; at 224 all of them would be enlarged, and 16 cores could
not decode as many images as the fast methods consume.

All runs happen in this process, one after the other, because a start costs as much as thousands of images. First, a few
epochs of each variant are timed, and their step times determine the numbers of epochs that end the program in time.
Training from scratch gets one run as long as the others' fine-tuning, and one as long as their pretraining and
fine-tuning together. Runs that did not finish in time are missing from the table, and the exit code is 1.
"""

import argparse
import json
import os
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from trainings import Done, pack_photos, run_finetuning, run_pretraining
from variants import SCRATCH, Size, label, variants

from pretrain.trainer.launch import exit_process, find_world
from pretrain.trainer.logs import log_to_console

GPU = Size(("model.arch=vit_small", "model.patch_size=8", "data.image_size=112"), 8, 384, 12, 256, 128, 50)
DRY = Size(("model.arch=vit_tiny", "model.patch_size=8", "data.image_size=112"), 8, 192, 12, 8, 8, 1)
COMPARED = (
    "LoMaR multiscale",
    "MAE",
    "LocalMIM",
    "LoMaR",
)  # in this order, so that the comparison that matters exists if time runs out
TIMED_EPOCHS = 6  # for setting the numbers of epochs; the first half fills the loader's buffers and does not count
LONG = f"{SCRATCH}, for as long in all"


class Evidence:
    """All runs, in OUT/runs; results go to OUT/results.jsonl, row by row."""

    def __init__(self, shards: Path, out: Path, minutes: float, size: Size):
        self.shards, self.out, self.size = shards, out, size
        self.variants = variants(size)
        # Imports already took seconds. In some containers the process start is unknown; imports take under a minute.
        imports = min(max(time.time() - psutil.Process().create_time(), 0), 60)
        self.start = time.monotonic() - imports
        self.deadline = self.start + 60 * minutes
        self.world = find_world()
        self.results: list[dict[str, Any]] = []
        workers = min(len(os.sched_getaffinity(0)), 16)
        self.common = [
            *size.model,
            f"data.num_workers={workers}",
            f"runs={out}/runs",
        ]

    def pretrain(self, name: str, variant: str, epochs: int) -> Done:
        overrides = [
            *self.common,
            f"name={name}",
            f"data.shards={self.shards}/all",
            f"optim.base_lr={self.variants[variant].base_lr}",
            f"train.global_batch_size={self.size.batch}",
            f"train.epochs={epochs}",
            f"optim.warmup_epochs={epochs / 10}",
            "model.compile=off",  # compiling each method would take several of the ten minutes
            *self.variants[variant].keys,
        ]
        return run_pretraining(self.world, overrides)

    def finetune(self, name: str, variant: str, epochs: int, start: Path | None) -> Done:
        """Fine-tunes a checkpoint, or random weights if `start` is None."""
        overrides = [
            *self.common,
            f"name={name}",
            f"data.shards={self.shards}/train",
            f"val.shards={self.shards}/val",
            f"val.every_epochs={epochs}",
            f"train.global_batch_size={self.size.finetune_batch}",
            f"train.epochs={epochs}",
            f"optim.warmup_epochs={min(5, epochs / 10)}",
        ]
        overrides += ["optim.layer_decay=1.0"] if start is None else [f"start.checkpoint={start}"]
        keys = self.variants[variant].keys if variant in self.variants else ()
        return run_finetuning(self.world, [*overrides, *(key for key in keys if key.startswith("model."))])

    def add(self, variant: str, tuned: Done, pretrained: Done | None = None) -> None:
        environment = json.loads(((pretrained or tuned).folder / "environment.json").read_text())
        row = {
            "variant": variant,
            "top1": tuned.evaluation["top1"],
            "minutes": round((tuned.training_s + (pretrained.training_s if pretrained else 0.0)) / 60, 3),
            **(summary(pretrained, "pretrain", self.size.batch) if pretrained else {}),
            **summary(tuned, "finetune", self.size.finetune_batch),
            **{key: environment[key] for key in ("numerics", "device", "git")},  # kernels; the GPU; our version
        }
        self.results.append(row)
        with (self.out / "results.jsonl").open("a") as file:
            file.write(f"{json.dumps(row)}\n")
        print(json.dumps(row), flush=True)

    def measure(self) -> None:
        """Measures all variants, with lengths chosen so that the last one ends before the deadline."""
        first = self.finetune("finetune-scratch", SCRATCH, self.size.finetune_epochs, None)
        self.add(SCRATCH, first)
        timed = {name: self.pretrain(f"timed-{label(name)}", name, TIMED_EPOCHS) for name in COMPARED}
        # What a run costs beyond its steps: starting workers, reconstructions, writing the encoder.
        besides = statistics.mean(done.seconds - done.training_s for done in timed.values())
        left = 0.95 * (self.deadline - time.monotonic()) - (2 * len(timed) + 1) * besides
        left -= (len(timed) + 1) * first.training_s
        share = left / (len(timed) + 1)  # seconds of each pretraining
        print(f"{share:.0f} s for each pretraining, then {first.training_s:.0f} s of fine-tuning", flush=True)
        for number, (name, before) in enumerate(timed.items()):
            epochs = self.epochs(share, before)
            done = self.pretrain(f"pretrain-{number}-{label(name)}", name, epochs)
            tuned = self.finetune(f"finetune-{label(name)}", name, self.size.finetune_epochs, done.folder)
            self.add(name, tuned, done)
        epochs = self.epochs(share + first.training_s, first)
        self.add(LONG, self.finetune("finetune-scratch-long", LONG, epochs, None))

    def epochs(self, seconds: float, like: Done) -> int:
        """The number of epochs that fit into these seconds at another run's speed."""
        epochs = seconds / (like.step_s * like.steps / like.rows[-1]["epoch"])
        return max(int(epochs), 1)


def summary(done: Done, prefix: str, batch: int) -> dict[str, float]:
    """A run's part of a results row; `data_wait` is a share of the time."""
    return {
        f"{prefix}_epochs": done.rows[-1]["epoch"],
        f"{prefix}_steps": done.steps,
        f"{prefix}_minutes": round(done.training_s / 60, 3),
        f"{prefix}_step_ms": round(1000 * done.step_s, 2),
        f"{prefix}_images_per_s": round(batch / done.step_s),
        f"{prefix}_data_wait": round(statistics.mean(row["data_wait"] for row in done.rows), 4),
    }


def report(results: list[dict[str, Any]]) -> None:
    """Prints a Markdown table."""
    print("| variant | minutes | epochs of pretraining | step, ms | data wait | top-1, % |\n|---|---|---|---|---|---|")
    for row in results:
        kind = "pretrain" if "pretrain_steps" in row else "finetune"
        epochs = row.get("pretrain_epochs", 0)
        step, wait = row[f"{kind}_step_ms"], row[f"{kind}_data_wait"]
        cells = [row["variant"], f"{row['minutes']:.2f}", f"{epochs:g}", f"{step:.1f}", f"{wait:.0%}"]
        print(f"| {' | '.join(cells)} | {100 * row['top1']:.1f} |")


def _time_is_up(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def run(options: argparse.Namespace) -> None:
    """Runs the experiment and ends the process, in time."""
    if not (options.dry or torch.cuda.is_available()):
        raise SystemExit("--gpu: torch finds no GPU; try it on a CPU with --gpu --dry")
    if (options.out / "runs").exists():
        raise SystemExit(f"{options.out} contains the runs of an earlier start: give another OUT")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.dry:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # with so little work, threads only wait for each other
    evidence = Evidence(options.out / "shards", options.out, options.minutes, DRY if options.dry else GPU)
    signal.signal(signal.SIGALRM, _time_is_up)
    signal.setitimer(signal.ITIMER_REAL, max(evidence.deadline - time.monotonic(), 1))
    log_to_console(evidence.world)
    complete = False
    try:
        pack_photos(options.tar, options.out, *((24, 3) if options.dry else ()))
        evidence.measure()
        complete = True
    except KeyboardInterrupt:
        print("stopped with some variants missing; the rows so far:", flush=True)
    signal.setitimer(signal.ITIMER_REAL, 0)
    report(evidence.results)
    print(json.dumps({"complete": complete, "seconds": time.monotonic() - evidence.start, "rows": evidence.results}))
    exit_process(0 if complete else 1)
