"""What all commands that train have in common: the command line, signals, logging, and errors in one line."""

import argparse
import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import NoReturn, Protocol, TypeVar

import torch

from data.parallel import print_error
from pretrain.trainer.attempt import mark_attempt, mark_bad_node, node_name
from pretrain.trainer.config import WatchdogConfig
from pretrain.trainer.launch import World, exit_process, find_world
from pretrain.trainer.listing import Catalog
from pretrain.trainer.logs import log_to_console
from pretrain.trainer.nonfinite import Diverged
from pretrain.trainer.run_folder import package_version
from pretrain.trainer.signals import Stopped, told_to_stop, watch_signals
from pretrain.trainer.watchdog import Watchdog


class TrainingConfig(Protocol):
    """What `main` needs from a configuration."""

    @property
    def watchdog(self) -> WatchdogConfig:
        """How long anything may take."""

    def memory_advice(self, ranks: int) -> str:
        """What to do if a GPU's memory is full: the keys to change."""


AnyConfig = TypeVar("AnyConfig", bound=TrainingConfig)
_log = logging.getLogger(__name__)

# What gloo, NCCL and torch's store report on the ranks that are left.
_LOST_RANK = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Connection refused|remote process exited|recvValue failed"
)
# What torch reports if a GPU, its link or its driver has failed, and not the program that runs on it.
_BROKEN_GPU = re.compile(
    r"uncorrectable|hardware stack error|busy or unavailable|no CUDA-capable device|unspecified launch failure"
    r"|CUDA (error: )?unknown error|NVLink|fallen off the bus|system not yet initialized"
)
PATIENCE = 5.0  # seconds for which other ranks leave it to the first one to report an error


@contextlib.contextmanager
def said_once(ranks_before: int) -> Iterator[None]:
    """For code that several ranks run alike: the first of them raises a ValueError at once, the others after a while.

    By then their launcher has ended them, since the first is gone. If they ended earlier, its message could be lost.

    Args:
        ranks_before: how many of these ranks come before this one.
    """
    try:
        yield
    except ValueError:
        if ranks_before:
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until:
                if told_to_stop():
                    exit_process(1)
                time.sleep(0.1)
        raise


def main(
    description: str | None,
    load: Callable[[str, list[str]], AnyConfig],
    train: Callable[[AnyConfig, World], None],
    recipe: str = "RECIPE",
    check: Callable[[AnyConfig, World], object] | None = None,
    catalog: Catalog | None = None,
) -> NoReturn:
    """Exits with 0 when the run is complete or was stopped by a signal, with 1 and one clear line otherwise.

    If a signal stopped the run, `mark_attempt` records it.

    Args:
        description: of the command, for --help.
        load: (recipe, overrides) -> the checked configuration.
        train: the whole run, on all ranks.
        recipe: what --help calls the first argument.
        check: a further check before anything is read; every rank finds the same, so that one reports it.
        catalog: what --recipes, --keys and --show print, if the command has them.
    """
    watch_signals()
    try:
        world = find_world()
        log_to_console(world)
        options = _parse(description, recipe, catalog)
        with said_once(world.rank):
            if (text := _listed(options, catalog)) is not None:
                if world.is_main:
                    with contextlib.suppress(BrokenPipeError):  # of `| head`
                        print(text, flush=True)
                exit_process(0)
            config = load(options.recipe, options.overrides)
            if check is not None:
                check(config, world)
    except ValueError as error:
        print_error(error)
        exit_process(1)
    exit_process(_exit_code(train, config, world))


def _exit_code(train: Callable[[AnyConfig, World], None], config: AnyConfig, world: World) -> int:
    """Trains; errors are logged, so that they are in the rank's log file as well, and told to the other ranks."""
    with Watchdog(config.watchdog, world) as watchdog:
        try:
            train(config, world)
        except Stopped as stopped:
            _log.info("%s", stopped)
            if world.is_main:
                return _mark_stopped()
            watchdog.leave()
            return 0
        except Exception as error:
            if world.size > 1 and not isinstance(error, ValueError) and _LOST_RANK.search(str(error)):
                if not (why := watchdog.cause()):
                    lost = ", ".join(watchdog.find_lost())
                    if told_to_stop() and not world.is_main:  # rank 0, which has the store, has stopped first
                        _log.info("stopped by a signal, as were other ranks (%s)", _first_line(error))
                        return 0
                    why = f"{lost} was killed, or lost with its node" if lost else "see its log, unless it was killed"
                    why += f" ({_first_line(error)})"
                _log.error("%s: another rank has ended: %s", world.error, why)
                return 1
            problem = _describe(error, config, world)
            if isinstance(error, RuntimeError) and _BROKEN_GPU.search(str(error)):
                _log.error("a GPU on %s has failed", node_name())
                with contextlib.suppress(OSError):  # then the job script excludes no node
                    mark_bad_node(node_name())
            _log.error("%s:%s", world.error, problem and f" {problem}", exc_info=not problem)
            watchdog.tell(problem or f"{type(error).__name__}: {_first_line(error)}")
            return 1
    return 0


def _describe(error: Exception, config: TrainingConfig, world: World) -> str:
    """What is wrong and what to do; '' for an unforeseen error, whose traceback is wanted."""
    if isinstance(error, torch.OutOfMemoryError):
        wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        more = f" (tried to allocate {wanted[1]} more)" if wanted else ""
        return f"the GPU's memory is full{more}: {config.memory_advice(world.size)}"
    return str(error) if isinstance(error, ValueError | Diverged | OSError) else ""


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _mark_stopped() -> int:
    try:
        mark_attempt("stopped")
    except OSError as error:
        _log.error("error: the job is not requeued, because a file could not be written: %s", error)
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
    listing.add_argument("--show", action="store_true", help="print the recipe with all overrides applied")
    options = parser.parse_intermixed_args()
    if options.recipe is None and not options.recipes and options.keys is None:
        parser.error(f"give a {recipe}: --recipes lists the shipped ones")
    return options


def _listed(options: argparse.Namespace, catalog: Catalog | None) -> str | None:
    """The listing that was asked for, if any."""
    if catalog is None:
        return None
    if options.recipes:
        return catalog.list_recipes()
    if options.keys is not None:
        return catalog.list_keys(options.keys)
    return catalog.show(options.recipe, options.overrides) if options.show else None
