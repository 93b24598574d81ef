"""What `run.py --gpu` does: ten minutes of one GPU, in which every variant gets the same minutes.

ViT-S/8 on Caltech-101 at 112 pixels: 14x14 patches, so windows, masks and tokens are those of 16-pixel patches at 224.
The photos have at most 176 pixels a side: at 224 all of them would be enlarged, and 16 cores could not make as many
images as the fast methods take.

Everything happens in this process, one run after the other: a start costs as much as thousands of images. Before the
pretrainings a few epochs of each are timed, and from their steps follow the numbers of epochs that end the program in
time. Training from scratch is fine-tuned once as long as the others, and once for as long as their pretraining and
fine-tuning together. What could not be done in time is missing in the table, and the exit code is 1.
"""

import argparse
import gc
import json
import os
import signal
import statistics
import tarfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from data.pack import pack
from data.sources import list_source
from downstream.classify.config import load as load_finetune
from downstream.classify.finetune import finetune
from pretrain.config import load as load_pretrain
from pretrain.run import pretrain
from pretrain.trainer.launch import exit_process, find_world
from pretrain.trainer.logs import log_to_console
from pretrain.trainer.metrics import read_metrics

HERE = Path(__file__).parent
DECODER = ("method.decoder_embed_dim=192", "method.decoder_depth=4", "method.decoder_num_heads=3")
LATE, PR_MIM = "method.mask_token_block=8", ("pr_mim.throw_ratio=0.5", "pr_mim.kernel_size=7")
# In this order: where time runs out, the comparison that matters most is there.
PRETRAINED = {
    "LoMaR fast (late mask tokens + PR-MIM)": ("method.name=lomar", LATE, *PR_MIM),
    "MAE": ("method.name=mae", *DECODER, "model.position=sincos"),
    "LoMaR": ("method.name=lomar",),
}
SCRATCH, LONG = "from scratch", "from scratch, for as long in all"


@dataclass(frozen=True)
class Sizes:
    """How much is done; `DRY` shows on a CPU that everything works."""

    model: tuple[str, ...]
    batch: int
    finetune_batch: int
    finetune_epochs: int
    timed_epochs: int  # the first half fills the loader's buffers, and does not count
    most_epochs: int
    classes: int = 101  # the first ones of the tar
    photos_per_class: int = 10**6  # of each of its three folders


GPU = Sizes(("model.arch=vit_small", "data.image_size=112"), 256, 128, 50, 6, 10**6)
DRY = Sizes(("model.arch=vit_tiny", "data.image_size=64"), 8, 8, 1, 1, 1, classes=24, photos_per_class=1)


@dataclass
class Done:
    """A finished training."""

    folder: Path
    seconds: float  # in all, with building, saving and evaluating
    rows: list[dict[str, Any]]  # its metrics

    @property
    def step_s(self) -> float:
        """Of its second half: until then, batches come out of buffers that were filled before the first step."""
        return statistics.mean(row["step_s"] for row in self.rows[len(self.rows) // 2 :])

    @property
    def steps(self) -> int:
        return int(self.rows[-1]["step"])

    @property
    def training_s(self) -> float:
        """The steps alone; a row speaks for the steps since the one before."""
        ends = [0, *(row["step"] for row in self.rows)]
        return sum(row["step_s"] * (end - start) for row, start, end in zip(self.rows, ends, ends[1:], strict=False))

    def summary(self, prefix: str, batch: int) -> dict[str, float]:
        """For a row of the results; waiting for data is a share of the time."""
        return {
            f"{prefix}_epochs": self.rows[-1]["epoch"],
            f"{prefix}_steps": self.steps,
            f"{prefix}_minutes": round(self.training_s / 60, 3),
            f"{prefix}_step_ms": round(1000 * self.step_s, 2),
            f"{prefix}_images_per_s": round(batch / self.step_s),
            f"{prefix}_data_wait": round(statistics.mean(row["data_wait"] for row in self.rows), 4),
        }


class Evidence:
    """All runs, in OUT/runs; results in OUT/results.jsonl, a row when it is known."""

    def __init__(self, shards: Path, out: Path, minutes: float, sizes: Sizes):
        self.shards, self.out, self.sizes = shards, out, sizes
        # Imports took seconds already; in some containers the start of a process is not known, but they took no minute.
        imports = min(max(time.time() - psutil.Process().create_time(), 0), 60)
        self.start = time.monotonic() - imports
        self.deadline = self.start + 60 * minutes
        self.world = find_world()
        self.results: list[dict[str, Any]] = []
        workers = min(len(os.sched_getaffinity(0)), 16)
        self.common = [
            *sizes.model,
            f"data.num_workers={workers}",
            "checkpoint.every_steps=1000000",
            f"runs={out}/runs",
        ]

    def train(self, run: Callable[..., None], load: Callable[..., Any], recipe: str, overrides: list[str]) -> Done:
        config = load(str(HERE / recipe), [*self.common, *overrides])
        began = time.monotonic()
        run(config, self.world)
        gc.collect()  # an engine's hooks hold it in cycles
        folder = Path(config.runs) / config.name
        return Done(folder, time.monotonic() - began, read_metrics(folder / "metrics.jsonl"))

    def pretrain(self, name: str, variant: str, epochs: int) -> Done:
        overrides = [
            f"name={name}",
            f"data.shards={self.shards}/all",
            f"train.global_batch_size={self.sizes.batch}",
            f"train.epochs={epochs}",
            f"optim.warmup_epochs={epochs / 10}",
            'model.compile="off"',  # compiling each method anew would take minutes of the ten
            *PRETRAINED[variant],
        ]
        return self.train(pretrain, load_pretrain, "pretrain.yaml", overrides)

    def finetune(self, name: str, variant: str, epochs: int, start: Path | None) -> Done:
        """Also of random weights."""
        overrides = [
            f"name={name}",
            f"data.shards={self.shards}/train",
            f"val.shards={self.shards}/val",
            f"val.every_epochs={epochs}",
            f"head.num_classes={self.sizes.classes}",
            f"train.global_batch_size={self.sizes.finetune_batch}",
            f"train.epochs={epochs}",
            f"optim.warmup_epochs={min(5, epochs / 10)}",
        ]
        overrides += ["optim.layer_decay=1.0"] if start is None else [f"start.checkpoint={start}"]
        overrides += [key for key in PRETRAINED.get(variant, ()) if key.startswith("model.")]
        return self.train(finetune, load_finetune, "finetune.yaml", overrides)

    def add(self, variant: str, tuned: Done, pretrained: Done | None = None) -> None:
        environment = json.loads(((pretrained or tuned).folder / "environment.json").read_text())
        row = {
            "variant": variant,
            "top1": read_metrics(tuned.folder / "evaluation.jsonl")[-1]["top1"],
            "minutes": round((tuned.training_s + (pretrained.training_s if pretrained else 0.0)) / 60, 3),
            **(pretrained.summary("pretrain", self.sizes.batch) if pretrained else {}),
            **tuned.summary("finetune", self.sizes.finetune_batch),
            **{key: environment[key] for key in ("numerics", "device", "git")},  # kernels; the GPU; our version
        }
        self.results.append(row)
        with (self.out / "results.jsonl").open("a") as file:
            file.write(f"{json.dumps(row)}\n")
        print(json.dumps(row), flush=True)

    def measure(self) -> None:
        """All variants, the lengths set so that the last one ends before the deadline."""
        sizes = self.sizes
        first = self.finetune("finetune-scratch", SCRATCH, sizes.finetune_epochs, None)
        self.add(SCRATCH, first)
        timed = {name: self.pretrain(f"timed-{label(name)}", name, sizes.timed_epochs) for name in PRETRAINED}
        # What a run costs beyond its steps: workers that start, reconstructions, an encoder that is written.
        besides = statistics.mean(done.seconds - done.training_s for done in timed.values())
        left = 0.95 * (self.deadline - time.monotonic()) - (2 * len(timed) + 1) * besides
        left -= (len(timed) + 1) * first.training_s
        share = left / (len(timed) + 1)  # seconds of each pretraining
        print(f"{share:.0f} s for each pretraining, {first.training_s:.0f} s of fine-tuning after it", flush=True)
        for number, (name, before) in enumerate(timed.items()):
            epochs = self.epochs(share, before)
            done = self.pretrain(f"pretrain-{number}-{label(name)}", name, epochs)
            tuned = self.finetune(f"finetune-{label(name)}", name, sizes.finetune_epochs, done.folder)
            self.add(name, tuned, done)
        epochs = self.epochs(share + first.training_s, first)
        self.add(LONG, self.finetune("finetune-scratch-long", LONG, epochs, None))

    def epochs(self, seconds: float, like: Done) -> int:
        """How many take these seconds, at the speed of another run."""
        epochs = seconds / (like.step_s * like.steps / like.rows[-1]["epoch"])
        return min(max(int(epochs), 1), self.sizes.most_epochs)


def label(name: str) -> str:
    return name.partition(" (")[0].replace(" ", "_").lower()


def pack_photos(tar: Path, out: Path, sizes: Sizes) -> Path:
    """Packs photos at train/CLASS, val/CLASS and extra/CLASS in a tar; the last has unlabeled ones for pretraining.

    Returns:
        The folder of the shards `all` (train and extra), `train` and `val`.
    """
    photos = out / "photos"
    with tarfile.open(tar) as file:
        by_folder = defaultdict(list)
        for member in file:
            if member.isfile():
                by_folder[os.path.dirname(member.name)].append(member)
        classes = sorted({os.path.basename(folder) for folder in by_folder})[: sizes.classes]
        for folder, members in tqdm(by_folder.items(), "unpacking", unit="folder"):
            if os.path.basename(folder) in classes:
                for member in members[: sizes.photos_per_class]:
                    file.extract(member, photos, filter="data")
    names = sorted(str(path.relative_to(photos)) for kind in ("train", "extra") for path in photos.glob(f"{kind}/*/*"))
    (photos / "all.txt").write_text("".join(f"{name}\n" for name in names))
    for name, source in {"all": "all.txt", "train": "train", "val": "val"}.items():
        pack(list_source(photos / source), out / "shards" / name, workers=len(os.sched_getaffinity(0)))
    return out / "shards"


def report(results: list[dict[str, Any]]) -> None:
    """A Markdown table."""
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
    """Ends the process, and does so in time."""
    sizes = DRY if options.dry else GPU
    if not (options.dry or torch.cuda.is_available()):
        raise SystemExit("--gpu: torch finds no GPU; --gpu --dry shows on a CPU that it works")
    if (options.out / "runs").exists():
        raise SystemExit(f"{options.out} holds the runs of another start: give another OUT")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.dry:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # with so little to do, threads only wait for each other
    evidence = Evidence(options.shards, options.out, options.minutes, sizes)
    signal.signal(signal.SIGALRM, _time_is_up)
    signal.setitimer(signal.ITIMER_REAL, max(evidence.deadline - time.monotonic(), 1))
    log_to_console(evidence.world)
    complete = False
    try:
        if options.shards.is_file():
            evidence.shards = pack_photos(options.shards, options.out, sizes)
        evidence.measure()
        complete = True
    except KeyboardInterrupt:
        print("stopped, with some variants missing: the rows so far", flush=True)
    signal.setitimer(signal.ITIMER_REAL, 0)
    report(evidence.results)
    print(json.dumps({"complete": complete, "seconds": time.monotonic() - evidence.start, "rows": evidence.results}))
    exit_process(0 if complete else 1)
