"""What the entries of trainings share: the command line, signals, and errors in one line."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, TypeVar

from pretrain.faults import Diverged, Stopped, watch_signals
from pretrain.launch import World, find_world, leave

AnyConfig = TypeVar("AnyConfig")


def main(
    description: str | None,
    load: Callable[[str, list[str]], AnyConfig],
    train: Callable[[AnyConfig, World], None],
    recipe: str = "RECIPE",
) -> NoReturn:
    """Exit code 0 when the run is complete or was stopped by a signal, 1 with one clear line otherwise.

    Args:
        description: of the command, for --help.
        load: (recipe, overrides) -> the checked configuration.
        train: the whole run, on all ranks.
        recipe: what --help calls the first argument.
    """
    watch_signals()
    try:
        world = find_world()
        config = load(*_parse(description, recipe))
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":  # the same on every rank
            print(f"error: {error}", file=sys.stderr)
        leave(1)
    try:
        train(config, world)
    except Stopped as stopped:
        if world.is_main:
            print(stopped)
    except (ValueError, Diverged, OSError) as error:
        print(f"error on rank {world.rank}: {error}", file=sys.stderr)
        leave(1)
    except Exception:
        traceback.print_exc()
        leave(1)
    leave(0)


def _parse(description: str | None, recipe: str) -> tuple[str, list[str]]:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar=recipe)
    parser.add_argument("overrides", metavar="section.key=value", nargs="*")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    options = parser.parse_args()
    return options.recipe, options.overrides
