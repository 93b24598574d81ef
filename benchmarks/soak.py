"""Kills a run at random and continues it, many times, and compares it with an undisturbed run.

    python benchmarks/soak.py [--quick] [--kills 25] [--seed 0] [--shards SHARDS ...] [--store] [section.key=value ...]

Two CPU ranks pretrain a ViT-Ti on small images. One run is undisturbed; another is killed and restarted until it has
been killed and has resumed `--kills` times (3 with `--quick`), and then runs to its end. `--seed` determines what
happens to it and when:

- `all`: SIGKILL to all ranks and their data workers, as when a node fails;
- `rank`: SIGKILL to one rank; the others must end by themselves;
- `signal`: SIGTERM to one rank or to all, after which the run saves and stops.

Each happens between a start and some steps later, so also while the run starts or saves. Each start uses 0, 1 or 2 data
workers per rank, and one of the SHARDS: the same shards in several places, paths or URLs (`--shards A --shards B`). The
undisturbed run reads the first. Without --shards, shards of noise are made; otherwise, a few hundred images are enough.
With `--store`, half of the starts read the shards from an S3 server where a quarter of the requests fail, with an empty
node cache (`pip install moto[server] boto3`).

Both runs must have the same images in every step, by key and pixels, and the same losses and gradient norms; the final
weights must have the same bits. The last line is one JSON object; the exit code is 1 if anything differs.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

from benchmarks.soak_ranks import PATIENCE, Ranks, has_ended, last_step, wait_until
from benchmarks.soak_store import failing_store
from data.index import load_index
from data.pack import pack
from data.sources import list_source
from pretrain.trainer.metrics import read_metrics

KINDS = ("all", "rank", "signal")
STEPS_PER_KILL = 20  # total steps per kill: more than the run advances between kills, or it would end too soon
BATCH = 8
MOST_STEPS = 5  # most steps that a start is left undisturbed


class Soak:
    """A run that is killed again and again.

    Args:
        start: starts the ranks of a run with these arguments; `Ranks`, or a test's replacement.
        recipe: its first argument.
        run: its folder.
        shards: places of the same shards.
        seed: determines what happens to it.
    """

    def __init__(self, start: Callable[..., Any], recipe: Path, run: Path, shards: Sequence[str], seed: int):
        self._start, self._recipe, self._run, self._shards = start, recipe, run, shards
        self._rng = np.random.default_rng(seed)
        self.kills = Counter[str]()
        self.resumed = 0
        self.seconds_to_start = 0.0  # until the first step is logged, in the slowest start so far

    def go(self, kills: int, bar: Any) -> None:
        """Runs to the end, after it has been killed and has resumed this many times.

        Raises:
            TimeoutError: it does not advance, or does not end.
            RuntimeError: it failed, or ended too soon.
        """
        while True:
            spared = min(self.kills.total(), self.resumed) >= kills
            ranks = self._started()
            if spared:
                self._wait(ranks, sys.maxsize, bar)
            else:
                self._wait(ranks, last_step(self._run) + int(self._rng.integers(0, MOST_STEPS + 1)), bar)
                self._kill_soon(ranks)
            self.resumed += "resumes from step_" in ranks.all[0].said()
            if spared:
                return
            if (self._run / "encoder.safetensors").exists():
                raise RuntimeError(f"the run finished after only {self.kills.total()} kills: give it more images")

    def _kill_soon(self, ranks: Any) -> None:
        """Kills the run within the time of two steps or, if it is still starting, of a start."""
        rows = read_metrics(self._run / "metrics.jsonl")
        started = rows and self._rows_at_start != len(rows)
        time.sleep(float(self._rng.uniform(0, 2 * rows[-1]["step_s"] if started else self.seconds_to_start)))
        if not has_ended(ranks):
            self._kill(ranks)

    def _started(self) -> Any:
        shards = self._shards[int(self._rng.integers(len(self._shards)))]
        workers = int(self._rng.integers(3))
        self._rows_at_start = len(read_metrics(self._run / "metrics.jsonl"))
        return self._start(
            self._recipe, f"name={self._run.name}", f"data.shards={shards}", f"data.num_workers={workers}"
        )

    def _wait(self, ranks: Any, step: int, bar: Any) -> None:
        """Waits until a step is logged or the run ends; the run must keep advancing."""
        began, first, seen = time.monotonic(), last_step(self._run), -1
        deadline = began + PATIENCE
        while not has_ended(ranks):
            now = last_step(self._run)
            if now == first + 1:
                self.seconds_to_start = max(self.seconds_to_start, time.monotonic() - began)
            bar.n = now
            bar.set_postfix_str(f"{self.kills.total()} kills, resumed {self.resumed} times")
            if now >= step:
                return
            if now != seen:
                deadline, seen = time.monotonic() + PATIENCE, now
            if time.monotonic() > deadline:
                ranks.kill()
                raise TimeoutError("the run stopped advancing:\n" + "\n".join(rank.said() for rank in ranks.all))
            time.sleep(0.05)
        if codes := [rank.returncode for rank in ranks.all if rank.returncode]:
            raise RuntimeError(f"the run failed ({codes}):\n" + "\n".join(rank.said() for rank in ranks.all))

    def _kill(self, ranks: Any) -> None:
        kind = KINDS[int(self._rng.integers(len(KINDS)))]
        number = int(self._rng.integers(len(ranks.all)))
        everyone = bool(self._rng.integers(2))
        self.kills[kind] += 1
        if kind == "all":
            ranks.kill()
            return
        for rank in ranks.all if kind == "signal" and everyone else [ranks.all[number]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGTERM if kind == "signal" else signal.SIGKILL)
        try:
            wait_until(lambda: has_ended(ranks), f"ranks to end after {kind}")
        finally:
            if not has_ended(ranks):
                ranks.kill()


def compare(whole: Path, soaked: Path) -> dict[str, bool]:
    """Whether two runs had the same images and losses in each step, and have the same weights."""

    def rows(name: str, keys: Sequence[str]) -> list[list[Any]]:
        both = [[[row[key] for key in keys] for row in read_metrics(run / name)] for run in (whole, soaked)]
        assert both[0], f"{whole / name} is empty"
        return both

    samples = rows("samples.jsonl", ("step", "keys", "digests"))
    losses = rows("metrics.jsonl", ("step", "loss", "grad_norm", "lr"))
    weights = [load_file(run / "encoder.safetensors") for run in (whole, soaked)]
    return {
        "samples_identical": samples[0] == samples[1],
        "losses_identical": losses[0] == losses[1],
        "weights_identical": weights[0].keys() == weights[1].keys()
        and all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items()),
    }


def make_shards(folder: Path, images: int = 120) -> Path:
    """Makes shards of noise images."""
    (photos := folder / "photos").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(images):
        small = Image.fromarray(rng.integers(0, 256, (12, 14, 3), dtype=np.uint8))
        small.resize((112, 96), Image.Resampling.BICUBIC).save(photos / f"{number:03d}.jpg", quality=90)
    pack(list_source(photos), folder / "shards", samples_per_shard=25)
    return folder / "shards"


def write_recipe(folder: Path, shards: str, kills: int) -> Path:
    """Writes the recipe of a small LoMaR that saves every third step and lasts for this many kills."""
    epochs = -(-(kills + 1) * STEPS_PER_KILL * BATCH // len(load_index(shards)))
    keys = {
        "name": "whole",
        "runs": str(folder / "runs"),
        "method": {"name": "lomar", "num_windows": 2, "window_size": 3},
        "model": {"arch": "vit_tiny"},
        "data": {"shards": shards, "image_size": 64, "num_workers": 1},
        "optim": {"warmup_epochs": 0.3, "base_lr": 1e-2},
        "train": {"epochs": epochs, "global_batch_size": BATCH, "precision": "fp32", "ds_config": "zero1"},
        "checkpoint": {"every_steps": 3},
        "log": {"every_steps": 1, "num_reconstructions": 2, "samples": True},
        "watchdog": {"start_minutes": 2},  # a rank may be killed before it meets the others
    }
    (folder / "soak.yaml").write_text(yaml.safe_dump(keys))
    return folder / "soak.yaml"


def soak(start: Callable[..., Any], recipe: Path, runs: Path, shards: Sequence[str], kills: int, seed: int) -> Any:
    """Performs both runs; returns the figures for the last line."""
    bar = tqdm(desc="the undisturbed run", unit="step", file=sys.stderr)
    through = Soak(start, recipe, runs / "whole", shards[:1], seed)
    through.go(0, bar)
    bar.total, before = last_step(runs / "whole"), time.monotonic()
    bar.set_description("the killed run")
    broken = Soak(start, recipe, runs / "soaked", shards, seed)
    broken.seconds_to_start = through.seconds_to_start
    broken.go(kills, bar)
    bar.close()
    return {
        "kills": broken.kills.total(),
        "resumed": broken.resumed,
        **compare(runs / "whole", runs / "soaked"),
        **{f"kills_{kind}": broken.kills[kind] for kind in KINDS},
        "steps": bar.total,
        "minutes": round((time.monotonic() - before) / 60, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python benchmarks/soak.py", description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the run's recipe")
    parser.add_argument("--quick", action="store_true", help="3 kills")
    parser.add_argument("--kills", type=int, default=25, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shards", action="append", metavar="SHARDS", help="shards of a few hundred images; repeat for other places"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep the runs here; must be new")
    parser.add_argument("--store", action="store_true", help="half of the starts read from a failing S3 server")
    args = parser.parse_intermixed_args(argv)
    kills = 3 if args.quick else args.kills
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = args.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=args.out is None)
        shards = args.shards or [str(make_shards(folder))]
        recipe = write_recipe(folder, shards[0], kills)
        overrides, cache, faults = list(args.overrides), folder / "cache", None
        if args.store:
            url, faults = stack.enter_context(failing_store(Path(shards[0]), args.seed))
            shards.append(url)
            overrides += [f"data.cache_dir={cache}", "data.shuffle_shards=2"]

        def start(recipe: Path, *keys: str) -> Ranks:
            shutil.rmtree(cache, ignore_errors=True)
            return Ranks(folder, str(recipe), *overrides, *keys)

        figures = soak(start, recipe, folder / "runs", shards, kills, args.seed)
        if faults is not None:
            figures["store"] = dict(faults)
    print(json.dumps(figures))
    return 0 if all(value for name, value in figures.items() if name.endswith("_identical")) else 1


if __name__ == "__main__":
    sys.exit(main())
