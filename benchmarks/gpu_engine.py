"""A real run of `pretrain/run.py` on one GPU, with DeepSpeed's engine and the data loader: its speed and data wait."""

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
from pretrain.trainer.metrics import read_metrics

RUN = Path(__file__).resolve().parents[1] / "pretrain" / "run.py"
WARMUP_LOGS = 3  # log rows whose steps compile, start workers and fill queues


@dataclass(frozen=True)
class Run:
    """What is trained: LoMaR B/16 at 224 or its fast variant, with a file of ds_configs/, and CUDA graphs or not."""

    ds_config: str
    fast: bool = False
    cuda_graphs: bool = True

    @property
    def name(self) -> str:
        name = f"engine: {'fast' if self.fast else 'lomar'}, {self.ds_config}"
        return name if self.cuda_graphs else f"{name}, without CUDA graphs"


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
            # 80 steps of 256 images, or 12 of 2
            photographs, copies, batch, epochs, every = (8, 1, 2, 3, 2) if session.dry else (128, 8, 256, 20, 5)
            environment = {**os.environ, "OMP_NUM_THREADS": "1"} if session.dry else dict(os.environ)
            command = [
                *(sys.executable, str(RUN), LOMAR, "name=engine", f"runs={folder / 'runs'}"),
                f"data.shards={make_shards(folder, photographs, copies)}",
                f"data.num_workers={1 if session.dry else max((os.cpu_count() or 2) - 1, 1)}",
                *(f"train.global_batch_size={batch}", "train.gradient_accumulation_steps=1"),
                *(f"train.epochs={epochs}", "optim.warmup_epochs=1"),
                *(f"log.every_steps={every}", "log.num_reconstructions=1", f"train.ds_config={run.ds_config}"),
                *(["model.arch=vit_tiny"] if session.dry else []),
                *(["method.mask_token_block=8", "pr_mim.throw_ratio=0.5"] if run.fast else []),
                *([] if run.cuda_graphs else ["model.cuda_graphs=off"]),
            ]
            rows = _start(command, environment, folder, session)
        if not rows:
            raise ValueError("the run ended before it logged a step at normal speed")
        result = {
            "batch": batch,
            "logged": len(rows),
            "images_per_s": statistics.median(row["images_per_s"] for row in rows),
            "data_wait": statistics.median(row["data_wait"] for row in rows),
            "loss": rows[-1]["loss"],
            "command": command[2:],
        }
        session.keep("engine", session.table("engine") | {run.name: result})
        session.say(
            f"{run.name}: {result['images_per_s']:.0f} images/s, {100 * result['data_wait']:.0f} % of the time waiting "
            f"for data from {os.cpu_count()} cores; loss {result['loss']:.3f}"
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
