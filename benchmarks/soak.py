"""Kills a run at random and continues it, many times, and compares it with one that was left alone.

    python benchmarks/soak.py [--quick] [--kills 25] [--seed 0] [--shards SHARDS ...] [section.key=value ...]

Two ranks on CPUs pretrain a ViT-Ti on small images. One run goes through; another is killed and started again, until it
has been killed and has resumed `--kills` times (3 with `--quick`), and then goes on to its end. What happens to it, and
when, is drawn from `--seed`:

- `all`: SIGKILL to all ranks and their data workers, as when a node fails;
- `rank`: SIGKILL to one rank, and the others have to end by themselves;
- `signal`: SIGTERM to one rank or to all, upon which the run saves and stops;

each between a start and some steps later, so also while it starts or saves. Each start has 0, 1 or 2 data workers a
rank, and one of the SHARDS: the same shards at several places, paths or URLs, such as a folder and the bucket of a
server that fails (`--shards A --shards B`); the run that goes through reads the first. Without --shards there are some
made of noise; of others a few hundred images are enough.

Both must have the same images in every step, by key and pixels, and the same losses and gradient norms; the weights at
the end must have the same bits. The last line is one JSON object; the exit code is 1 if anything differs.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
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

from data.index import load_index
from data.pack import pack
from data.sources import list_source
from pretrain.trainer.metrics import read_metrics

RUN = Path(__file__).resolve().parent.parent / "pretrain" / "run.py"
KINDS = ("all", "rank", "signal")
STEPS_PER_KILL = 20  # of the whole run: more than it advances between two of them, or it would end too soon
BATCH = 8
MOST_STEPS = 5  # that it is left in peace for
PATIENCE = 300.0  # seconds in which ranks end by themselves, or a run advances


class Rank:
    """A process of a run."""

    def __init__(self, process: subprocess.Popen[bytes], said: Path):
        self._process, self._said, self.pid = process, said, process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    def said(self) -> str:
        return self._said.read_text(errors="replace")


class Ranks:
    """The processes of a run, started as `srun` does: without a launcher that ends the others when one is gone."""

    def __init__(self, folder: Path, *arguments: str, count: int = 2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.all = []
        for rank in range(count):
            said = folder / f"rank{rank}.txt"
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
            environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
            with said.open("w") as file:
                process = subprocess.Popen(
                    [sys.executable, str(RUN), *arguments],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            self.all.append(Rank(process, said))

    def kill(self) -> None:
        """SIGKILL to every rank and its data workers."""
        for rank in self.all:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
        wait_until(lambda: has_ended(self), "the killed ranks to end")


def has_ended(ranks: Any) -> bool:
    """Whether all processes of a run have."""
    return all(rank.returncode is not None for rank in ranks.all)


def wait_until(happened: Callable[[], bool], what: str) -> None:
    """Raises TimeoutError after `PATIENCE`."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE:.0f} s for {what}")
        time.sleep(0.02)


def last_step(run: Path) -> int:
    """That a run has logged."""
    rows = read_metrics(run / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


class Soak:
    """A run that is killed again and again.

    Args:
        start: starts the ranks of a run with these arguments; `Ranks`, or what tests have.
        recipe: its first argument.
        run: its folder.
        shards: places of the same shards.
        seed: of what happens to it.
    """

    def __init__(self, start: Callable[..., Any], recipe: Path, run: Path, shards: Sequence[str], seed: int):
        self._start, self._recipe, self._run, self._shards = start, recipe, run, shards
        self._rng = np.random.default_rng(seed)
        self.kills = Counter[str]()
        self.resumed = 0
        self.seconds_to_start = 0.0  # until the first step has been logged, of the slowest start so far

    def go(self, kills: int, bar: Any) -> None:
        """Until it is at its end, after so many kills and as many times that it has resumed.

        Raises:
            TimeoutError: it does not advance, or does not end.
            RuntimeError: it failed, or was at its end too soon.
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
                raise RuntimeError(f"the run was at its end after {self.kills.total()} kills: give it more images")

    def _kill_soon(self, ranks: Any) -> None:
        """Within two steps, or, while it starts, the time that this takes."""
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
        """Until a step has been logged, or the run is over; it has to advance meanwhile."""
        began, first, seen = time.monotonic(), last_step(self._run), -1
        deadline = began + PATIENCE
        while not has_ended(ranks):
            now = last_step(self._run)
            if now == first + 1:
                self.seconds_to_start = max(self.seconds_to_start, time.monotonic() - began)
            bar.n = now
            bar.set_postfix_str(f"{self.kills.total()} kills, {self.resumed} times resumed")
            if now >= step:
                return
            if now != seen:
                deadline, seen = time.monotonic() + PATIENCE, now
            if time.monotonic() > deadline:
                ranks.kill()
                raise TimeoutError("no step any more:\n" + "\n".join(rank.said() for rank in ranks.all))
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
    """Some, of noise."""
    (photos := folder / "photos").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(images):
        small = Image.fromarray(rng.integers(0, 256, (12, 14, 3), dtype=np.uint8))
        small.resize((112, 96), Image.Resampling.BICUBIC).save(photos / f"{number:03d}.jpg", quality=90)
    pack(list_source(photos), folder / "shards", samples_per_shard=25)
    return folder / "shards"


def write_recipe(folder: Path, shards: str, kills: int) -> Path:
    """A small LoMaR, saved at every third step, that lasts for so many kills."""
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
    }
    (folder / "soak.yaml").write_text(yaml.safe_dump(keys))
    return folder / "soak.yaml"


def soak(start: Callable[..., Any], recipe: Path, runs: Path, shards: Sequence[str], kills: int, seed: int) -> Any:
    """Both runs; the figures of the last line."""
    bar = tqdm(desc="the run that goes through", unit="step", file=sys.stderr)
    through = Soak(start, recipe, runs / "whole", shards[:1], seed)
    through.go(0, bar)
    bar.total, before = last_step(runs / "whole"), time.monotonic()
    bar.set_description("the run that is killed")
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
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the run's recipe")
    parser.add_argument("--quick", action="store_true", help="3 kills")
    parser.add_argument("--kills", type=int, default=25, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shards", action="append", metavar="SHARDS", help="shards of a few hundred images; again: another place"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keeps the runs; must be new")
    args = parser.parse_intermixed_args(argv)
    kills = 3 if args.quick else args.kills
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=args.out is None)
        shards = args.shards or [str(make_shards(folder))]
        recipe = write_recipe(folder, shards[0], kills)

        def start(recipe: Path, *keys: str) -> Ranks:
            return Ranks(folder, str(recipe), *args.overrides, *keys)

        figures = soak(start, recipe, folder / "runs", shards, kills, args.seed)
    print(json.dumps(figures))
    return 0 if all(value for name, value in figures.items() if name.endswith("_identical")) else 1


if __name__ == "__main__":
    sys.exit(main())
