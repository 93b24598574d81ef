"""What two cores can say: every variant gets the same time of one core, and the same number of epochs.

The encoder has 8 blocks, 128 wide, on 14x14 patches of 8 pixels. A run is a process of one thread, two at a time:

1. The steps of each variant are timed, in processor time, so that the machine may be busy with other work.
2. Learning rates are tuned for each variant: a third of the time each, judged by the attentive probe on photographs
   of the training set.
3. Every variant is pretrained for the same time, fine-tuned and tested, the first ones with several seeds.
4. The same, by what is faster than LoMaR, for as many epochs as LoMaR has in that time.

A command that was interrupted continues where it stopped: OUT/rows has a file for each run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm
from variants import SCRATCH, Size, label, variants

HERE = Path(__file__).parent
CPU = Size(("model.arch=vit_tiny", "model.patch_size=8", "data.image_size=112"), 8, 128, 8, 64, 64, 8)
QUICK = replace(CPU, finetune_epochs=1)
RATES = (1e-3, 3e-3)
REFERENCE = "LoMaR"  # whose epochs all others have in the second comparison
SEEDED = 4  # the first variants have all seeds
IMAGES = 6985
TIMED_STEPS = 8


@dataclass(frozen=True)
class Job:
    """A run: a pretraining and what is measured of it.

    Attributes:
        kind: `timing`, `tuning` (the probe) or `test` (fine-tuning).
        epochs: of pretraining; 0 from scratch.
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
    """All jobs, then the tables."""
    size, minutes = (QUICK, 0.2) if options.quick else (CPU, options.minutes)
    jobs = Jobs(options, size)
    names, tried = list(variants(size))[: 2 if options.quick else None], RATES[: 1 if options.quick else None]
    timed = jobs.done([Job("timing", name) for name in names])
    step_s = {row["variant"]: row["step_s"] for row in timed}
    epochs = {name: max(1, round(60 * minutes / step_s[name] * size.batch / IMAGES)) for name in names}
    tuned = jobs.done([Job("tuning", name, max(1, epochs[name] // 3), rate) for name in names for rate in tried])
    rates = {name: max((row["probe"], row["base_lr"]) for row in tuned if row["variant"] == name)[1] for name in names}
    tests = [Job("test", SCRATCH, seed=seed) for seed in range(options.seeds)]
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
    """Runs them, two at a time, unless their rows are there."""

    def __init__(self, options: argparse.Namespace, size: Size):
        self.out, self.shards, self.size = options.out, options.out / "shards", size
        if not (self.out / "rows").is_dir():
            from trainings import pack_photos

            pack_photos(options.tar, self.out)
            (self.out / "rows").mkdir()

    def done(self, jobs: list[Job]) -> list[dict[str, Any]]:
        """The rows of some jobs, in their order."""
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return list(tqdm(pool.map(self._row, jobs), jobs[0].kind, len(jobs), unit="run"))

    def _row(self, job: Job) -> dict[str, Any]:
        file = self.out / "rows" / f"{job.name}.json"
        if not file.exists():
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "TIMM_FUSED_ATTN": "0"}  # fused is slower on a CPU
            command = [sys.executable, str(HERE / "cpu.py"), json.dumps(asdict(job)), str(self.shards), str(self.out)]
            with (self.out / f"{job.name}.log").open("w") as log:
                code = subprocess.run(
                    [*command, str(self.size.finetune_epochs)], env=environment, stdout=log, stderr=subprocess.STDOUT
                ).returncode
            if code:
                raise SystemExit(f"{' '.join(command)} failed: see {log.name}")
        return json.loads(file.read_text())


def report(rows: list[dict[str, Any]]) -> None:
    """A Markdown table: mean and standard deviation over seeds."""
    print("| pretraining | epochs | minutes of a core | base_lr | top-1, % | seeds |\n|---|---|---|---|---|---|")
    for variant, epochs in dict.fromkeys((row["variant"], row["epochs"]) for row in rows):
        same = [row for row in rows if (row["variant"], row["epochs"]) == (variant, epochs)]
        scores = [100 * row["top1"] for row in same]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        cells = [variant, f"{epochs:g}", f"{same[0]['minutes']:.1f}", f"{same[0]['base_lr']:g}"]
        print(f"| {' | '.join(cells)} | {statistics.mean(scores):.1f}{spread} | {len(scores)} |")


def run_job(job: Job, shards: Path, out: Path, finetune_epochs: int) -> dict[str, Any]:
    """In a process of its own."""
    from pretrain.models.vit import ARCHS, Arch

    # The smallest encoder that there is has too many blocks for two cores.
    ARCHS["vit_tiny"] = Arch(CPU.dim, CPU.depth, CPU.dim // 64)
    from trainings import run_finetuning, run_pretraining

    from pretrain.trainer.launch import find_world
    from pretrain.trainer.logs import log_to_console

    world = find_world()
    log_to_console(world)
    common = [f"seed={job.seed}", f"runs={out}/runs", "data.num_workers=0"]
    row: dict[str, Any] = asdict(job)
    keys = variants(CPU)[job.variant].keys if job.variant != SCRATCH else ()
    overrides = [*common, *CPU.model, f"data.shards={shards}/all", f"optim.base_lr={job.base_lr}"]
    overrides += [f"train.epochs={job.epochs:g}", f"optim.warmup_epochs={job.epochs / 10}", f"name={job.name}", *keys]
    if job.kind == "timing":
        return row | {"step_s": time_step([*overrides, "train.epochs=1", "optim.warmup_epochs=0"])}
    if job.kind == "tuning":
        probe = [
            f"probe.train={shards}/tune_train",
            f"probe.val={shards}/tune_val",
            f"probe.every_epochs={job.epochs:g}",
        ]
        return row | {"probe": run_pretraining(world, [*overrides, *probe]).evaluation["attentive_top1"]}
    start = ["optim.layer_decay=1.0"]
    if job.variant != SCRATCH:
        done = run_pretraining(world, overrides)
        row["steps"], start = done.steps, [f"start.checkpoint={done.folder}"]
    tuned = run_finetuning(
        world,
        [
            *common,
            *CPU.model,
            f"name={job.name}-finetuned",
            f"data.shards={shards}/train",
            f"val.shards={shards}/val",
            f"val.every_epochs={finetune_epochs}",
            f"train.epochs={finetune_epochs}",
            f"optim.warmup_epochs={finetune_epochs / 10}",
            *start,
            *(key for key in keys if key.startswith("model.")),
        ],
    )
    return {"steps": 0, **row, "top1": tuned.evaluation["top1"]}


def time_step(overrides: list[str]) -> float:
    """Seconds of one core for a step: reading, decoding, both passes and AdamW."""
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
    result = run_job(job, Path(arguments[1]), Path(arguments[2]), int(arguments[3]))
    (Path(arguments[2]) / "rows" / f"{job.name}.json").write_text(json.dumps(result))
    exit_process(0)
