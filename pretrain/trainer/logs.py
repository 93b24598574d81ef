"""Python's `logging` for a run: messages on the main rank's console, and all of them in a file for each rank."""

import contextlib
import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm

from data.parallel import print_any_name
from data.storage.location import without_secrets
from pretrain.trainer.launch import World

VERBOSE = "LOMAR_VERBOSE"  # environment variable: 1 to see the messages of libraries, too
_PROJECT = ("data", "pretrain", "downstream", "__main__")  # an entry that a launcher starts as a script is __main__


class _Formatter(logging.Formatter):
    """Removes passwords and tokens, even if a library's error repeats them."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


class _ConsoleHandler(logging.Handler):
    """Prints lines that do not break a progress bar: warnings on stderr, the rest on stdout."""

    def __init__(self, level: int):
        super().__init__(level)
        self.setFormatter(_Formatter())

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        try:
            tqdm.write(self.format(record), file=stream)
            stream.flush()
        except Exception:
            self.handleError(record)


class _RankFileHandler(logging.FileHandler):
    """Appends to a rank's file. A full disk must not stop a training whose next checkpoint may fit again."""

    def __init__(self, path: Path):
        super().__init__(path, encoding="utf-8", errors="backslashreplace", delay=True)
        self.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # when opening it: the main rank has removed the folder of a refused run
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Does nothing: what matters is on the console as well."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def is_verbose() -> bool:
    """Whether messages of libraries are shown."""
    return os.environ.get(VERBOSE, "0") not in ("", "0")


def log_to_console(world: World) -> None:
    """Sends this project's messages to the console: all of those of the main rank, only errors of other ranks.

    Warnings of libraries go to the files of `log_to_file`, and to the console as well if `VERBOSE` is set.
    """
    print_any_name()
    verbose = is_verbose()
    logging.captureWarnings(not verbose)
    _replace(_ConsoleHandler(logging.INFO if world.is_main or verbose else logging.ERROR), only_ours=not verbose)
    for package in _PROJECT:
        logging.getLogger(package).setLevel(logging.INFO)


def log_to_file(folder: Path, world: World) -> None:
    """Sends them to `folder`/rank<N>.log as well, with times, together with warnings that libraries log.

    The main rank creates the folder.
    """
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    _replace(_RankFileHandler(folder / f"rank{world.rank}.log"), only_ours=False)


def _replace(handler: logging.Handler, only_ours: bool) -> None:
    """Adds a handler in place of an earlier one of its type: a process may train several runs in turn."""
    root = logging.getLogger()
    for old in [old for old in root.handlers if type(old) is type(handler)]:
        root.removeHandler(old)
        old.close()
    if only_ours:
        handler.addFilter(lambda record: record.name.partition(".")[0] in _PROJECT)
    root.addHandler(handler)
