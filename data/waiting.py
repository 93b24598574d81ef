"""What a process checks while it waits: signals, above all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

POLL = 1.0  # seconds of waiting between checks

_while_waiting: ContextVar[Callable[[], None] | None] = ContextVar("while_waiting", default=None)


@contextmanager
def while_waiting(look: Callable[[], None]) -> Iterator[None]:
    """Calls `look` every second while a batch is waited for in this context; what it raises ends the wait."""
    before = _while_waiting.set(look)
    try:
        yield
    finally:
        _while_waiting.reset(before)


def look_while_waiting() -> None:
    """Calls what the context's `while_waiting` was given, if anything; call it while this process waits for data."""
    look = _while_waiting.get()
    if look is not None:
        look()
