"""What the commands that train share: the command line, signals, logging, and errors in one line."""

import argparse
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from pretrain.trainer.launch import World, exit_process, find_world
from pretrain.trainer.logs import log_to_console
from pretrain.trainer.nonfinite import Diverged
from pretrain.trainer.signals import Stopped, watch_signals

AnyConfig = TypeVar("AnyConfig")

STOPPED_FILE = "LOMAR_STOPPED_FILE"  # names the file that tells slurm/_train.sh to requeue the job


def main(
    description: str | None,
    load: Callable[[str, list[str]], AnyConfig],
    train: Callable[[AnyConfig, World], None],
    recipe: str = "RECIPE",
) -> NoReturn:
    """Exit code 0 when the run is complete or was stopped by a signal, 1 with one clear line otherwise.

    A run that a signal stopped makes the file that the environment names as `STOPPED_FILE`.

    Args:
        description: of the command, for --help.
        load: (recipe, overrides) -> the checked configuration.
        train: the whole run, on all ranks.
        recipe: what --help calls the first argument.
    """
    watch_signals()
    try:
        world = find_world()
        log_to_console(world)
        config = load(*_parse(description, recipe))
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":  # the same on every rank
            print(f"error: {error}", file=sys.stderr)
        exit_process(1)
    try:
        train(config, world)
    except Stopped as stopped:
        if world.is_main:
            print(stopped)
            if STOPPED_FILE in os.environ:
                Path(os.environ[STOPPED_FILE]).touch()
    except (ValueError, Diverged, OSError) as error:
        print(f"error on rank {world.rank}: {error}", file=sys.stderr)
        exit_process(1)
    except Exception:
        traceback.print_exc()
        exit_process(1)
    exit_process(0)


def _parse(description: str | None, recipe: str) -> tuple[str, list[str]]:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar=recipe)
    parser.add_argument("overrides", metavar="section.key=value", nargs="*")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    version = f"lomar-deepspeed {importlib.metadata.version('lomar-deepspeed')}"
    parser.add_argument("--version", action="version", version=version)
    options = parser.parse_args()
    return options.recipe, options.overrides
