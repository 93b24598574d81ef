"""Runs this project's own commands within a process, and packs the photographs that they train on."""

import gc
import os
import statistics
import tarfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.pack import pack
from data.sources import list_source
from downstream.classify.config import load as load_finetune
from downstream.classify.finetune import finetune
from pretrain.config import load as load_pretrain
from pretrain.run import pretrain
from pretrain.trainer.launch import World
from pretrain.trainer.metrics import read_metrics

HERE = Path(__file__).parent


@dataclass
class Done:
    """A finished training."""

    folder: Path
    seconds: float  # in total, including building, saving and evaluating
    rows: list[dict[str, Any]]  # its metrics

    @property
    def step_s(self) -> float:
        """Mean step time of the second half; in the first, batches come from buffers filled before the first step."""
        return statistics.mean(row["step_s"] for row in self.rows[len(self.rows) // 2 :])

    @property
    def steps(self) -> int:
        return int(self.rows[-1]["step"])

    @property
    def training_s(self) -> float:
        """Seconds of the steps alone; a row stands for all steps since the previous row."""
        ends = [0, *(row["step"] for row in self.rows)]
        return sum(row["step_s"] * (end - start) for row, start, end in zip(self.rows, ends, ends[1:], strict=False))

    @property
    def evaluation(self) -> dict[str, float]:
        """The last evaluation."""
        return read_metrics(self.folder / "evaluation.jsonl")[-1]


def run_pretraining(world: World, overrides: list[str]) -> Done:
    return _run(pretrain, load_pretrain(str(HERE / "pretrain.yaml"), overrides), world)


def run_finetuning(world: World, overrides: list[str]) -> Done:
    return _run(finetune, load_finetune(str(HERE / "finetune.yaml"), overrides), world)


def _run(train: Callable[..., None], config: Any, world: World) -> Done:
    began = time.monotonic()
    train(config, world)
    gc.collect()  # an engine's hooks form reference cycles with it
    folder = Path(config.runs) / config.name
    return Done(folder, time.monotonic() - began, read_metrics(folder / "metrics.jsonl"))


def pack_photos(tar: Path, out: Path, classes: int = 10**6, photos_per_class: int = 10**6) -> None:
    """Packs a tar's photos in train/CLASS, val/CLASS and extra/CLASS; the last are unlabeled, for pretraining.

    The shards are in OUT/shards: `all` (train and extra), `train`, `val`, and two parts of train for choosing learning
    rates without the test photos: `tune_val`, the first third of each class, and `tune_train`, the rest.

    Args:
        tar, out: the tar, and a folder for what is unpacked and packed.
        classes, photos_per_class: use only the first classes, and only the first photos of each folder.
    """
    photos = out / "photos"
    with tarfile.open(tar) as file:
        by_folder = defaultdict(list)
        for member in file:
            if member.isfile():
                by_folder[os.path.dirname(member.name)].append(member)
        chosen = sorted({os.path.basename(folder) for folder in by_folder})[:classes]
        for folder, members in tqdm(by_folder.items(), "unpacking", unit="folder"):
            if os.path.basename(folder) in chosen:
                for member in members[:photos_per_class]:
                    file.extract(member, photos, filter="data")
    for folder in sorted(photos.glob("train/*")):
        of_class = sorted(folder.iterdir())
        for number, photo in enumerate(of_class):
            part = photos / ("tune_val" if number < len(of_class) // 3 else "tune_train") / folder.name
            part.mkdir(parents=True, exist_ok=True)
            os.link(photo, part / photo.name)
    names = sorted(str(path.relative_to(photos)) for kind in ("train", "extra") for path in photos.glob(f"{kind}/*/*"))
    (photos / "all.txt").write_text("".join(f"{name}\n" for name in names))
    for source in ("all.txt", "train", "val", "tune_train", "tune_val"):
        pack(list_source(photos / source), out / "shards" / Path(source).stem, workers=len(os.sched_getaffinity(0)))
