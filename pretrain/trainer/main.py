"""What all commands that train have in common: the command line, signals, logging, and errors in one line."""

import argparse
import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

import torch

from pretrain.trainer.launch import World, exit_process, find_world
from pretrain.trainer.listing import Catalog
from pretrain.trainer.logs import log_to_console
from pretrain.trainer.nonfinite import Diverged
from pretrain.trainer.run_folder import package_version
from pretrain.trainer.signals import Stopped, watch_signals


class TrainingConfig(Protocol):
    """What `main` asks of a configuration."""

    def memory_advice(self, ranks: int) -> str:
        """The keys to change where a GPU's memory is full, as what to do."""


AnyConfig = TypeVar("AnyConfig", bound=TrainingConfig)
_log = logging.getLogger(__name__)

STOPPED_FILE = "LOMAR_STOPPED_FILE"  # of the environment: by this file slurm/_train.sh knows that it is to requeue


class SaidByAnotherError(Exception):
    """An error that the first rank of the node says."""


@contextlib.contextmanager
def said_once_a_node(world: World) -> Iterator[None]:
    """For what all ranks of a node do alike: a ValueError is said by the first of them."""
    try:
        yield
    except ValueError:
        if world.local_rank == 0:
            raise
        raise SaidByAnotherError from None


def main(
    description: str | None,
    load: Callable[[str, list[str]], AnyConfig],
    train: Callable[[AnyConfig, World], None],
    recipe: str = "RECIPE",
    check: Callable[[AnyConfig, World], object] | None = None,
    catalog: Catalog | None = None,
) -> NoReturn:
    """Exit code 0 when the run is complete or was stopped by a signal, 1 with one clear line otherwise.

    Where a signal stopped the run, it creates the file that the environment variable `STOPPED_FILE` names.

    Args:
        description: of the command, for --help.
        load: (recipe, overrides) -> the checked configuration.
        train: the whole run, on all ranks.
        recipe: what --help calls the first argument.
        check: what else can be refused at once, before anything is read; the same on every rank, so that one says it.
        catalog: what --recipes, --keys and --show print, if the command has them.
    """
    watch_signals()
    try:
        world = find_world()
        log_to_console(world)
        options = _parse(description, recipe, catalog)
        if (text := _listed(options, catalog)) is not None:
            if world.is_main:
                print(text)
            exit_process(0)
        config = load(options.recipe, options.overrides)
        if check is not None:
            check(config, world)
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":  # the same on every rank
            print(f"error: {error}", file=sys.stderr)
        exit_process(1)
    exit_process(_exit_code(train, config, world))


def _exit_code(train: Callable[[AnyConfig, World], None], config: AnyConfig, world: World) -> int:
    """Trains; what goes wrong is logged, so that it is in the rank's log file as well."""
    try:
        train(config, world)
    except Stopped as stopped:
        _log.info("%s", stopped)
        return _mark_stopped() if world.is_main else 0
    except SaidByAnotherError:
        return 1
    except torch.OutOfMemoryError as error:
        wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        more = f" ({wanted[1]} more were asked for)" if wanted else ""
        _log.error(
            "error on rank %d: the GPU's memory is full%s: %s", world.rank, more, config.memory_advice(world.size)
        )
        return 1
    except (ValueError, Diverged, OSError) as error:
        _log.error("error on rank %d: %s", world.rank, error)
        return 1
    except Exception:
        _log.exception("error on rank %d:", world.rank)
        return 1
    return 0


def _mark_stopped() -> int:
    path = os.environ.get(STOPPED_FILE)
    try:
        if path:
            Path(path).touch()
    except OSError as error:
        _log.error("error: the job is not requeued, since %s could not be written: %s", path, error)
        return 1
    return 0


def _parse(description: str | None, recipe: str, catalog: Catalog | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar=recipe, nargs=None if catalog is None else "?")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    parser.add_argument("--version", action="version", version=f"lomar-deepspeed {package_version('lomar-deepspeed')}")
    if catalog is None:
        return parser.parse_args()
    listing = parser.add_mutually_exclusive_group()
    listing.add_argument("--recipes", action="store_true", help="list the shipped recipes")
    listing.add_argument(
        "--keys", nargs="?", const="", metavar="NAME", help="list all keys, or those of a section or method"
    )
    listing.add_argument("--show", action="store_true", help="print the recipe under all overrides")
    options = parser.parse_intermixed_args()
    if options.recipe is None and not options.recipes and options.keys is None:
        parser.error(f"give a {recipe}: --recipes lists the shipped ones")
    return options


def _listed(options: argparse.Namespace, catalog: Catalog | None) -> str | None:
    """What was asked to be printed, if anything."""
    if catalog is None:
        return None
    if options.recipes:
        return catalog.list_recipes()
    if options.keys is not None:
        return catalog.list_keys(options.keys)
    return catalog.show(options.recipe, options.overrides) if options.show else None
