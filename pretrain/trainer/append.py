"""Appends to lists that grow during a training, such as metrics or skipped images; a failure never ends it."""

import logging
from pathlib import Path

_failed: set[Path] = set()
_log = logging.getLogger(__name__)


def append(path: Path, text: str) -> None:
    """Appends lines to a file; if that fails, it is logged once, and the training goes on without them."""
    try:
        with path.open("a", encoding="utf-8") as file:
            # The write that failed may have left half a line.
            file.write("\n" + text if path in _failed else text)
    except OSError as error:
        if path not in _failed:
            _log.warning("%s cannot be written: %s; training continues, but lines will be missing", path, error)
        _failed.add(path)
    else:
        _failed.discard(path)
