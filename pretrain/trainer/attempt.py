"""Tells a job's script how this attempt at the training went: by empty files, since an exit code may be another rank's.

The environment variable `ATTEMPT` has the beginning of their paths. Without it there is no such script.
"""

import os
from pathlib import Path
from typing import Literal

ATTEMPT = "LOMAR_ATTEMPT"


def mark_attempt(how: Literal["saved", "stopped", "hung"]) -> None:
    """Creates the file `ATTEMPT`-`how`; raises OSError if that is not possible."""
    if attempt := os.environ.get(ATTEMPT):
        Path(f"{attempt}-{how}").touch()
