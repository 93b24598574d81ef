"""Python's `logging` for a run: messages on the main rank's console, and all of them in a file for each rank."""

import logging
import sys
from pathlib import Path

from tqdm import tqdm

from pretrain.trainer.launch import World


class _ConsoleHandler(logging.Handler):
    """Lines that do not break a progress bar: warnings on stderr, the rest on stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        tqdm.write(self.format(record), file=stream)
        stream.flush()


def log_to_console(world: World) -> None:
    """From now on the messages of this project go to the main rank's console; of other ranks only errors do."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _ConsoleHandler)]:
        root.removeHandler(handler)
    console = _ConsoleHandler(logging.INFO if world.is_main else logging.ERROR)
    console.addFilter(lambda record: record.name.partition(".")[0] in ("data", "pretrain", "downstream"))
    root.addHandler(console)
    for package in ("data", "pretrain", "downstream"):
        logging.getLogger(package).setLevel(logging.INFO)


def log_to_file(folder: Path, world: World) -> None:
    """From now on they go to `folder`/rank<N>.log as well, with times, and so do warnings of the libraries."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"rank{world.rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
