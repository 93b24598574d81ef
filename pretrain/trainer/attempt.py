"""Tells the job script how this attempt at the training went: by empty files, since an exit code may be another rank's.

The environment variable `ATTEMPT` holds the prefix of their paths. If it is not set, there is no such script.
"""

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

ATTEMPT = "LOMAR_ATTEMPT"


def mark_attempt(how: Literal["saved", "stopped", "hung"]) -> None:
    """Creates the file `ATTEMPT`-`how`; raises OSError if that fails."""
    _create(how)


def mark_bad_node(node: str) -> None:
    """Creates the file `ATTEMPT`-bad-`node`, so that a requeued job excludes that node; raises OSError, too."""
    _create(f"bad-{node}")


def try_briefly(action: Callable[..., object], *arguments: object, seconds: float = 2.0) -> None:
    """Does something that may fail, or hang with a disk or a lock, and waits no longer than that for its end."""

    def attempt() -> None:
        with suppress(Exception):
            action(*arguments)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)


def node_name() -> str:
    """This machine's name, as its scheduler knows it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _create(what: str) -> None:
    if attempt := os.environ.get(ATTEMPT):
        Path(f"{attempt}-{what}").touch()
