"""A run for fault injection: its recipes, its processes, what it leaves behind, and what it should leave."""

import contextlib
import json
import os
import re
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from helpers.processes import CLASSIFY, RUN
from helpers.rank_checks import assert_same_run
from PIL import Image

from data.pack import pack
from data.sources import list_source
from pretrain.trainer.metrics import read_metrics

EVERY, STEPS = 5, 40  # steps between checkpoints, and steps of a whole run
PATIENCE = 120.0  # seconds within which an undisturbed run starts training, advances or ends
COLORS = {"blue": (40, 60, 200), "green": (60, 180, 50), "red": (210, 50, 40), "yellow": (220, 210, 60)}
SCRIPTS = {"pretrain": RUN, "finetune": CLASSIFY}
RESULTS = {"pretrain": "encoder.safetensors", "finetune": "model.safetensors"}  # final outputs


class Hung(Exception):  # noqa: N818 - a verdict
    """Something neither ended nor made progress in time."""


class Lost(Exception):  # noqa: N818
    """More than the work since the last checkpoint must be repeated."""


class Wrong(Exception):  # noqa: N818
    """The result has different bits, the cause is not reported, or something is left behind."""


def make_data(folder: Path) -> Path:
    """Makes shards of 64 small noisy images of four classes."""
    rng = np.random.default_rng(0)
    for name, color in COLORS.items():
        (folder / "images" / name).mkdir(parents=True)
        for number in range(16):
            pixels = np.clip(color + rng.normal(0, 40, (72, 88, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{number:02d}.jpg", quality=90)
    pack(list_source(folder / "images"), folder / "shards", samples_per_shard=24)
    return folder / "shards"


def write_recipes(folder: Path, shards: Path) -> dict[str, Path]:
    """Writes a small pretraining and a small fine-tuning from scratch, with `STEPS` steps each."""
    shared = {
        "runs": str(folder / "runs"),
        "model": {"arch": "vit_tiny"},
        "train": {"epochs": STEPS // 8, "global_batch_size": 8, "precision": "fp32"},
        "checkpoint": {"every_steps": EVERY, "keep_last": 3},
        "log": {"every_steps": 1},
        "watchdog": {"step_minutes": 1, "start_minutes": 2, "checkpoint_minutes": 1, "evaluation_minutes": 2},
    }
    data = {"shards": str(shards), "image_size": 64, "num_workers": 1}
    pretraining = {
        **shared,
        "name": "pretrain",
        "method": {"name": "lomar", "num_windows": 2, "window_size": 3},
        "data": data,
        "optim": {"warmup_epochs": 0.3, "base_lr": 1e-2},
    }
    tuning = {
        **shared,
        "name": "finetune",
        "data": data,
        "val": {"shards": str(shards), "batch_size": 16, "every_epochs": STEPS},
        "augment": {"mixup": 0.8},
        "ema": {"decay": 0.8},
        "optim": {"base_lr": 1e-2, "warmup_epochs": 1, "layer_decay": 0.75},
    }
    recipes = {}
    for keys in (pretraining, tuning):
        recipes[keys["name"]] = folder / f"{keys['name']}.yaml"
        recipes[keys["name"]].write_text(yaml.safe_dump(keys))
    return recipes


class Scene:
    """One run of a case.

    Args:
        start: starts ranks, like `helpers.processes.starter`.
        recipe: its first argument.
        training: `pretrain` or `finetune`.
        run: its folder, which must be new.
        overrides: of the recipe, including the ZeRO stage.

    Attributes:
        shards: what the run reads; `own_shards` replaces it with a copy that may be damaged.
        watched: numbers of the ranks that must end while the fault lasts; None: all.
        script, port: for the next start.
    """

    def __init__(self, start: Callable[..., Any], recipe: Path, training: str, run: Path, overrides: list[str]):
        self._start, self._recipe, self.training = start, recipe, training
        self.run, self.overrides = run, [f"runs={run.parent}", f"name={run.name}", *overrides]
        self.shards = Path(yaml.safe_load(recipe.read_text())["data"]["shards"])
        self.ranks: Any = None
        self.watched: list[int] | None = None
        self.script, self.port = SCRIPTS[training], None
        self.before = 0  # the newest sound checkpoint's step when ranks were last started
        self._logged: dict[Path, int] = {}  # sizes of log files when ranks were last started
        self.pids: set[int] = set()  # of all ranks; each leads a session that its workers belong to

    def start(self, *overrides: str, processes: int = 2) -> "Scene":
        """Starts all ranks; those of an earlier start must have ended."""
        self.before = max(self.sound_checkpoints(), default=0)
        self._logged = {path: path.stat().st_size for path in self.run.glob("logs/*.log")}
        self.ranks = self._start(
            self._recipe, *self.overrides, *overrides, processes=processes, script=self.script, port=self.port
        )
        self.pids |= {rank.pid for rank in self.ranks.all}
        return self

    def adopt(self, ranks: Any) -> "Scene":
        """Takes over ranks that were started in another way, with `arguments`."""
        self.ranks = ranks
        self.pids |= {os.getsid(rank.pid) for rank in ranks.all}
        return self

    @property
    def arguments(self) -> list[str]:
        """The arguments of a command that trains this run."""
        return [str(self._recipe), *self.overrides]

    def last_step(self) -> int:
        rows = read_metrics(self.run / "metrics.jsonl")
        return rows[-1]["step"] if rows else 0

    @property
    def is_over(self) -> bool:
        return (self.run / RESULTS[self.training]).exists()

    def until(self, happened: Callable[[], object], what: str) -> "Scene":
        """Waits while ranks run; raises Wrong if they end first and Hung if it takes too long."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            if all(rank.returncode is not None for rank in self.ranks.all):
                raise Wrong(f"the run ended before {what}: {self.codes()} {self.said()[-1500:]}")
            if time.monotonic() > deadline:
                raise Hung(f"{PATIENCE:.0f} s without {what}")
            time.sleep(0.003)
        return self

    def until_step(self, step: int) -> "Scene":
        return self.until(lambda: self.last_step() >= step, f"step {step}")

    def until_said(self, text: str) -> "Scene":
        return self.until(lambda: re.search(text, self.said()), f"'{text}'")

    def send(self, number: int, *ranks: int) -> None:
        """Sends a signal to these ranks, or to all."""
        for rank in [self.ranks.all[rank] for rank in ranks] or self.ranks.all:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, number)

    def kill(self, *ranks: int) -> "Scene":
        """Sends SIGKILL to these ranks only, or to all ranks and their workers."""
        self.send(signal.SIGKILL, *ranks)  # also reaches ranks that do not lead a session yet
        if not ranks:
            self.ranks.kill()
        return self

    def killed_run(self, step: int = 17) -> "Scene":
        """Starts all ranks and kills them after a step; by default, there are checkpoints of steps 5, 10 and 15."""
        return self.start().until_step(step).kill()

    def workers(self, rank: int) -> list[psutil.Process]:
        return psutil.Process(self.ranks.all[rank].pid).children()

    def own_shards(self, folder: Path) -> Path:
        """Gives this run its own copy of the shards; call it before the first start."""
        for path in self.shards.iterdir():
            (folder / path.name).parent.mkdir(parents=True, exist_ok=True)
            (folder / path.name).write_bytes(path.read_bytes())
        self.overrides.append(f"data.shards={folder}")
        self.shards = folder
        return folder

    def wait(self, seconds: float, ranks: list[int] | None = None) -> None:
        """Waits until ranks have ended; raises Hung if they do not."""
        deadline = time.monotonic() + seconds
        wanted = self.ranks.all if ranks is None else [self.ranks.all[rank] for rank in ranks]
        while any(rank.returncode is None for rank in wanted):
            if time.monotonic() > deadline:
                alive = [number for number, rank in enumerate(self.ranks.all) if rank.returncode is None]
                raise Hung(f"ranks {alive} did not end within {seconds:.0f} s, at step {self.last_step()}")
            time.sleep(0.02)

    def codes(self) -> list[int | None]:
        return [rank.returncode for rank in self.ranks.all]

    def said(self) -> str:
        return "\n".join(rank.said() for rank in self.ranks.all)

    def told(self) -> str:
        """What ranks printed and wrote to their log files since the last start."""
        logs = [path.read_text(errors="replace")[self._logged.get(path, 0) :] for path in self.run.glob("logs/*.log")]
        return "\n".join([*logs, self.said()])

    def checkpoints(self) -> list[Path]:
        """Finished checkpoints, the newest first."""
        return sorted((self.run / "checkpoints").glob("step_????????"), reverse=True)

    def sound_checkpoints(self) -> list[int]:
        """Steps of the checkpoints whose files all match the manifest, by an independent check."""
        return [int(path.name.removeprefix("step_")) for path in self.checkpoints() if is_sound(path)]

    def left_processes(self, seconds: float = 10) -> list[str]:
        """Processes of the ranks' sessions that are still alive after some seconds."""
        deadline = time.monotonic() + seconds
        while (left := list(self._processes())) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def _processes(self) -> Iterator[str]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) in self.pids and process.status() != psutil.STATUS_ZOMBIE:
                    yield f"process {process.pid} ({process.status()})"

    def left_files(self) -> list[str]:
        """What a finished run should not leave behind: unfinished folders and files, and shared memory."""
        found = [
            path
            for path in self.run.rglob("*")
            if path.suffix == ".tmp" or path.name.startswith(("unfinished", "deleted_"))
        ]
        found += [path for pid in self.pids for path in Path("/dev/shm").glob(f"torch_{pid}_*")]
        return [str(path.relative_to(self.run) if path.is_relative_to(self.run) else path) for path in found]

    def end(self) -> None:
        """Kills all remaining processes of the run."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) in self.pids:
                    process.send_signal(signal.SIGKILL)


def is_sound(checkpoint: Path) -> bool:
    """Whether all files have the size and CRC-32 in the manifest, and its step matches the folder's name."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        files, step = manifest["files"], manifest["state"]["step"]
        whole = all(
            [(content := (checkpoint / name).read_bytes()) and len(content), zlib.crc32(content)] == list(facts[:2])
            for name, facts in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return whole and bool(files) and step == int(checkpoint.name.removeprefix("step_"))


def differences(whole: Path, other: Path) -> str:
    """The first difference between two runs, in words; '' if there is none."""
    try:
        assert_same_run(whole, other)
    except AssertionError as error:
        return str(error).partition("\n")[0] or f"{sys.exc_info()[2] and 'bits differ'}"
    return ""
