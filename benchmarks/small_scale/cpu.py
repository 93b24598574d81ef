"""The experiment for two cores: every variant gets the same time on one core, and also the same number of epochs.

The encoder has 8 blocks, 128 wide, on 14x14 patches of 8 pixels. It is judged by an attentive probe, because a quarter
of an hour of fine-tuning on a core is hardly enough for it to start learning. Each run is a single-threaded process;
two run at a time:

1. The steps of each variant are timed in CPU time, so that the machine may be busy with other work.
2. Learning rates are tuned for each variant: a fifth of the time each, judged on photographs from the training set.
3. Every variant is pretrained for the same time and tested, the first ones with several seeds.
4. Variants faster than LoMaR are also pretrained for the number of epochs that LoMaR completes in that time.

An interrupted command continues where it stopped: OUT/rows has a file for each run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from variants import Size, label, variants

HERE = Path(__file__).parent
CPU = Size(("model.arch=vit_tiny", "model.patch_size=8", "data.image_size=112"), 8, 128, 8, 64, 64, 8)
UNTRAINED = "not pretrained"
RATES = (1e-3, 3e-3)
REFERENCE = "LoMaR"  # its number of epochs is used in the second comparison
SEEDED = 4  # the first variants have all seeds
IMAGES = 6985
TIMED_STEPS = 8


@dataclass(frozen=True)
class Job:
    """A run: a pretraining and its measurement.

    Attributes:
        kind: `timing`, `tuning` or `test`.
        epochs: of pretraining; 0 if there is none.
    """

    kind: str
    variant: str
    epochs: float = 0.0
    base_lr: float = 1e-3
    seed: int = 0

    @property
    def name(self) -> str:
        return "-".join(map(str, (self.kind, label(self.variant), self.epochs, self.base_lr, self.seed)))


def run(options: argparse.Namespace) -> None:
    """Runs all jobs, then prints the table."""
    minutes = 0.2 if options.quick else options.minutes
    jobs = Jobs(options)
    names, tried = list(variants(CPU))[: 2 if options.quick else None], RATES[: 1 if options.quick else None]
    timed = jobs.done([Job("timing", name) for name in names])
    step_s = {row["variant"]: row["step_s"] for row in timed}
    epochs = {name: max(1, round(60 * minutes / step_s[name] * CPU.batch / IMAGES)) for name in names}
    tuned = jobs.done([Job("tuning", name, max(1, epochs[name] // 5), rate) for name in names for rate in tried])
    rates = {name: max((row["probe"], row["base_lr"]) for row in tuned if row["variant"] == name)[1] for name in names}
    tests = [Job("test", UNTRAINED, seed=seed) for seed in range(options.seeds)]
    tests += [
        Job("test", name, epochs[name], rates[name], seed)
        for seed in range(options.seeds)
        for name in names[: SEEDED if seed else None]
    ]
    faster = [name for name in names if step_s[name] < step_s[REFERENCE]]
    tests += [Job("test", name, epochs[REFERENCE], rates[name]) for name in faster]
    rows = [
        {**row, "minutes": row["steps"] * step_s.get(row["variant"], 0) / 60}
        for row in jobs.done(list(dict.fromkeys(tests)))
    ]
    report(rows)
    print(json.dumps({"step_s": step_s, "tuning": tuned, "tests": rows}))


class Jobs:
    """Runs jobs, one per core at a time, unless their rows exist."""

    def __init__(self, options: argparse.Namespace):
        self.out, self.shards = options.out, options.out / "shards"
        if not (self.out / "rows").is_dir():
            from trainings import pack_photos

            pack_photos(options.tar, self.out)
            (self.out / "rows").mkdir()

    def done(self, jobs: list[Job]) -> list[dict[str, Any]]:
        """Runs jobs and returns their rows in the same order."""
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return list(tqdm(pool.map(self._row, jobs), jobs[0].kind, len(jobs), unit="run"))

    def _row(self, job: Job) -> dict[str, Any]:
        file = self.out / "rows" / f"{job.name}.json"
        if not file.exists():
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "TIMM_FUSED_ATTN": "0"}  # fused is slower on a CPU
            command = [sys.executable, str(HERE / "cpu.py"), json.dumps(asdict(job)), str(self.shards), str(self.out)]
            with (self.out / f"{job.name}.log").open("w") as log:
                code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
            if code:
                raise SystemExit(f"{' '.join(command)} failed: see {log.name}")
        return json.loads(file.read_text())


def report(rows: list[dict[str, Any]]) -> None:
    """Prints a Markdown table with mean and standard deviation over seeds."""
    print("| pretraining | epochs | minutes of a core | base_lr | probe, top-1, % | seeds |\n|---|---|---|---|---|---|")
    for variant, epochs in dict.fromkeys((row["variant"], row["epochs"]) for row in rows):
        same = [row for row in rows if (row["variant"], row["epochs"]) == (variant, epochs)]
        scores = [100 * row["probe"] for row in same]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        cells = [variant, f"{epochs:g}", f"{same[0]['minutes']:.1f}", f"{same[0]['base_lr']:g}"]
        print(f"| {' | '.join(cells)} | {statistics.mean(scores):.1f}{spread} | {len(scores)} |")


def run_job(job: Job, shards: Path, out: Path) -> dict[str, Any]:
    """Runs a job, in its own process, and returns its row."""
    from pretrain.models.vit import ARCHS, Arch

    # The smallest regular encoder has too many blocks for two cores.
    ARCHS["vit_tiny"] = Arch(CPU.dim, CPU.depth, CPU.dim // 64)
    from trainings import run_pretraining

    from pretrain.trainer.launch import find_world
    from pretrain.trainer.logs import log_to_console

    world = find_world()
    log_to_console(world)
    parts = ("tune_train", "tune_val") if job.kind == "tuning" else ("train", "val")
    overrides = [
        *(f"seed={job.seed}", f"runs={out}/runs", f"name={job.name}", "data.num_workers=0", *CPU.model),
        *(f"data.shards={shards}/all", f"optim.base_lr={job.base_lr}", f"train.epochs={job.epochs or 1:g}"),
        f"optim.warmup_epochs={job.epochs / 10}",
        *variants(CPU)["LoMaR" if job.variant == UNTRAINED else job.variant].keys,
    ]
    row: dict[str, Any] = asdict(job)
    if job.kind == "timing":
        return row | {"step_s": time_step([*overrides, "optim.warmup_epochs=0"])}
    overrides += [f"probe.{key}={shards}/{part}" for key, part in zip(("train", "val"), parts, strict=True)]
    overrides.append(f"probe.every_epochs={job.epochs or 1:g}")
    if job.variant == UNTRAINED:
        return row | {"steps": 0, "probe": probe_untrained(world, overrides)}
    done = run_pretraining(world, overrides)
    return row | {"steps": done.steps, "probe": done.evaluation["attentive_top1"]}


def probe_untrained(world: Any, overrides: list[str]) -> float:
    """The attentive probe of LoMaR's encoder right after initialization."""
    from pretrain.build import build_method
    from pretrain.config import load
    from pretrain.probe.in_training import Probe
    from pretrain.trainer.launch import init_distributed
    from pretrain.trainer.seed import seed_step

    config = load(str(HERE / "pretrain.yaml"), overrides)
    device = init_distributed(world)
    seed_step(config.seed)
    encoder = build_method(config).encoder
    return float(Probe(config, encoder, world, device).measure(encoder)["attentive_top1"])


def time_step(overrides: list[str]) -> float:
    """CPU seconds of a step on one core: reading, decoding, both passes and AdamW."""
    import torch

    from data.index import load_index
    from pretrain.build import build_ema, build_method
    from pretrain.config import load
    from pretrain.trainer.assemble import build_loader
    from pretrain.trainer.launch import find_world
    from pretrain.trainer.optim import build_adamw, parameter_groups

    config = load(str(HERE / "pretrain.yaml"), overrides)
    method = build_method(config).train()
    ema = build_ema(config, method, torch.device("cpu"))
    optimizer = build_adamw(parameter_groups(method, config.optim.weight_decay), config, 0)
    loader = build_loader(config, load_index(config.data.shards), find_world(), method.mask_sampler())
    times, began = [], time.process_time()
    for (batch,) in loader.batches(0, TIMED_STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            loss = method(batch.images, batch.mask_indices, **ema.model_inputs(batch.images))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - began)
        began = time.process_time()
    return statistics.median(times)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))
    from pretrain.trainer.launch import exit_process

    arguments = sys.argv[1:]
    job = Job(**json.loads(arguments[0]))
    result = run_job(job, Path(arguments[1]), Path(arguments[2]))
    (Path(arguments[2]) / "rows" / f"{job.name}.json").write_text(json.dumps(result))
    exit_process(0)
