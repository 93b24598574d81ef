"""Runs a grid of fine-tunings of one recipe and reports the best run, and the mean and deviation over the grid.

    python -m downstream.classify.sweep transfer_flowers_vitb16_224_100e data.shards=/data/flowers/train \\
        val.shards=/data/flowers/val start.checkpoint=runs/my-run name=flowers \\
        --grid optim.base_lr=1e-4,2.5e-4,5e-4 --grid optim.weight_decay=0.05,0.1

All settings are checked before the first one is trained. The runs are `runs/<name>/run<number>`; an interrupted sweep
continues when the same command is run again. The last line of the output is a JSON object.
"""

import argparse
import itertools
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from data.parallel import print_error
from downstream.classify.config import FinetuneConfig, load
from pretrain.trainer.metrics import read_metrics
from pretrain.trainer.run_folder import RunFolder

SCRIPT = Path(__file__).with_name("finetune.py")


def parse_grid(arguments: list[str]) -> list[list[str]]:
    """['a=1,2', 'b=3'] -> [['a=1', 'b=3'], ['a=2', 'b=3']].

    Raises:
        ValueError: there is no argument, or one is not `key=value,value`.
    """
    keys = []
    for argument in arguments:
        key, equals, values = argument.partition("=")
        if not equals or not all(values.split(",")):
            raise ValueError(f"--grid {argument}: write section.key=value,value")
        keys.append([f"{key}={value}" for value in values.split(",")])
    if not keys:
        raise ValueError("give at least one --grid section.key=value,value")
    return [list(setting) for setting in itertools.product(*keys)]


def configure(recipe: str, overrides: list[str], grid: list[list[str]]) -> list[FinetuneConfig]:
    """The configuration of every setting; raises ValueError if one cannot work, before anything is trained."""
    base = load(recipe, overrides)
    folder = [f"runs={Path(base.runs) / base.name}"]
    return [load(recipe, [*overrides, *setting, *folder, f"name=run{n:03d}"]) for n, setting in enumerate(grid)]


def train(config: FinetuneConfig, launcher: list[str]) -> dict[str, Any]:
    """Trains one setting, or continues it, and returns the last evaluation.

    Raises:
        ValueError: the run failed and printed its own error, or it was stopped.
    """
    folder = RunFolder(Path(config.runs) / config.name)
    folder.root.mkdir(parents=True, exist_ok=True)
    recipe = folder.root / "setting.yaml"
    recipe.write_text(config.to_yaml())
    if subprocess.run([*launcher, str(SCRIPT), str(recipe)]).returncode:
        raise ValueError(f"the run in {folder.root} failed: fix the error and run the same command again to continue")
    measured = read_metrics(folder.evaluation)
    if not measured or measured[-1]["epoch"] < config.train.epochs:
        raise ValueError(f"the run in {folder.root} was stopped: run the same command again to continue")
    return measured[-1]


def find_metric(measured: dict[str, Any]) -> str:
    """The metric that ranks settings: top-1, or the mean average precision if images have lists of labels."""
    return "top1" if "top1" in measured else "map"


def summarize(grid: list[list[str]], scores: list[float]) -> dict[str, Any]:
    """The best setting, and the mean and the deviation (n - 1) of the scores over the grid, as shares."""
    best = max(range(len(grid)), key=scores.__getitem__)
    return {
        "best": scores[best],
        "setting": grid[best],
        "mean": statistics.mean(scores),
        "std": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "runs": len(scores),
    }


def main(arguments: list[str] | None = None) -> NoReturn:
    """Exits with 0 after the table and the summary, or with 1 and one clear error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*")
    parser.add_argument("--grid", action="append", default=[], metavar="section.key=value,value")
    parser.add_argument(
        "--launcher", default="deepspeed", help="the command that starts the ranks, such as 'srun python -u'"
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        grid = parse_grid(options.grid)
        configs = configure(options.recipe, options.overrides, grid)
        scores = []
        for config, setting in zip(configs, grid, strict=True):
            measured = train(config, shlex.split(options.launcher))
            metric = find_metric(measured)
            scores.append(measured[metric])
            print(f"{config.name} {' '.join(setting)}: {metric} {scores[-1]:.2%}", flush=True)
    except (ValueError, OSError) as error:
        print_error(error)
        sys.exit(1)
    summary = summarize(grid, scores)
    print(f"best {summary['best']:.2%} ({summary['mean']:.2%} ± {summary['std']:.2%} over {summary['runs']} runs)")
    print(json.dumps(summary))
    sys.exit(0)


if __name__ == "__main__":
    main()
