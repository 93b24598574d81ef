"""Real runs of `pretrain/run.py` on one GPU, with DeepSpeed's engine and the data loader.

They measure images/s, the share of time waiting for data, and how long a checkpoint stalls the training.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.gpu_session import Session
from benchmarks.variants import LOMAR
from data.pack import pack
from data.sources import list_source
from pretrain.trainer.config import CheckpointConfig
from pretrain.trainer.metrics import read_metrics

RUN = Path(__file__).resolve().parents[1] / "pretrain" / "run.py"
IMAGES, DRY_IMAGES = 1024, 8
DEFAULT_SAVE_STEPS = CheckpointConfig().every_steps
WARMUP_LOGS = 3  # log rows whose steps compile, start workers and fill queues


@dataclass(frozen=True)
class Run:
    """What is trained: LoMaR at 224 or its fast variant, with a file of ds_configs/, and CUDA graphs or not.

    Attributes:
        saves: whether it also saves checkpoints, twice before the last, and trains twice as long.
    """

    ds_config: str
    fast: bool = False
    cuda_graphs: bool = True
    arch: str = "vit_base"
    saves: bool = False

    @property
    def name(self) -> str:
        name = f"engine: {'fast' if self.fast else 'lomar'}, {self.ds_config}"
        name += "" if self.cuda_graphs else ", without CUDA graphs"
        return f"{name}, {self.arch} with checkpoints" if self.saves else name

    def keys(self, dry: bool) -> list[str]:
        """Overrides of LoMaR's recipe, for `IMAGES` images, or `DRY_IMAGES` in a dry run."""
        batch, steps, every = (2, 12, 2) if dry else (256 if self.arch == "vit_base" else 128, 80, 5)
        if self.saves:
            steps *= 2
        epochs = steps * batch // (DRY_IMAGES if dry else IMAGES)
        return [
            *(f"train.global_batch_size={batch}", "train.gradient_accumulation_steps=1"),
            *(f"train.epochs={epochs}", "optim.warmup_epochs=1"),
            *(f"log.every_steps={every}", "log.num_reconstructions=1", f"train.ds_config={self.ds_config}"),
            f"model.arch={'vit_tiny' if dry else self.arch}",
            *(["method.mask_token_block=8", "pr_mim.throw_ratio=0.5"] if self.fast else []),
            *([] if self.cuda_graphs else ["model.cuda_graphs=off"]),
            *([f"checkpoint.every_steps={steps * 2 // 5}"] if self.saves else []),
        ]


def make_shards(folder: Path, photographs: int, copies: int) -> Path:
    """Makes shards of ImageNet-like JPEGs, 500 x 375 pixels and about 100 KB: smooth noise, each in several copies."""
    images, shards = folder / "images", folder / "shards"
    images.mkdir()
    rng = np.random.default_rng(0)
    for number in range(photographs):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC))
        noisy = np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
        first = images / f"{number:04d}_0.jpg"
        Image.fromarray(noisy).save(first, quality=90)
        for copy in range(1, copies):
            os.link(first, images / f"{number:04d}_{copy}.jpg")
    pack(list_source(images), shards, samples_per_shard=128)
    return shards


def engine(run: Run) -> Callable[[Session], None]:
    """The section that starts a run in its own process, and reads its metrics."""

    def section(session: Session) -> None:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
            folder = Path(temporary)
            shards = make_shards(folder, 8, 1) if session.dry else make_shards(folder, 128, 8)
            environment = {**os.environ, "OMP_NUM_THREADS": "1"} if session.dry else dict(os.environ)
            command = [
                *(sys.executable, str(RUN), LOMAR, "name=engine", f"runs={folder / 'runs'}"),
                f"data.shards={shards}",
                f"data.num_workers={1 if session.dry else max((os.cpu_count() or 2) - 1, 1)}",
                *run.keys(session.dry),
            ]
            rows = _start(command, environment, folder, session)
        if not rows:
            raise ValueError("the run ended before it logged a step at normal speed")
        result = {
            "logged": len(rows),
            "images_per_s": statistics.median(row["images_per_s"] for row in rows),
            "data_wait": statistics.median(row["data_wait"] for row in rows),
            "loss": rows[-1]["loss"],
            "command": command[2:],
        }
        stalls = [row["checkpoint_stall_s"] for row in rows if "checkpoint_stall_s" in row]
        if run.saves:
            seconds = DEFAULT_SAVE_STEPS * statistics.median(row["step_s"] for row in rows)
            result |= {"stalls_s": stalls, "stall_shares": [stall / (stall + seconds) for stall in stalls]}
        session.keep("engine", session.table("engine") | {run.name: result})
        session.say(
            f"{run.name}: {result['images_per_s']:.0f} images/s, {100 * result['data_wait']:.0f} % of the time waiting "
            f"for data from {os.cpu_count()} cores; loss {result['loss']:.3f}"
            + "".join(f"; a checkpoint stalled it for {stall:.2f} s" for stall in stalls)
        )

    return section


def _start(command: list[str], environment: dict[str, str], folder: Path, session: Session) -> list[dict]:
    """The logged metrics of a run, which is ended if it takes too long."""
    limit = max(session.left(), 20)
    log = folder / "log.txt"
    with log.open("w") as file:
        try:
            subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=limit, check=True)
        except subprocess.TimeoutExpired:
            session.say(f"the run was stopped after {limit:.0f} s")
        except subprocess.CalledProcessError as error:
            raise ChildProcessError(f"exit status {error.returncode}:\n{log.read_text()[-3000:]}") from None
    record = folder / "runs" / "engine" / "environment.json"
    if record.exists():
        session.keep("engine_environment", json.loads(record.read_text()))
    return read_metrics(folder / "runs" / "engine" / "metrics.jsonl")[WARMUP_LOGS:]
