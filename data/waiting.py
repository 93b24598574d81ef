"""What is looked at while this process waits: signals, above all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

POLL = 1.0  # seconds of waiting between looks

_while_waiting: ContextVar[Callable[[], None] | None] = ContextVar("while_waiting", default=None)


@contextmanager
def while_waiting(look: Callable[[], None]) -> Iterator[None]:
    """Within this context `look` is called every second in which a batch is waited for; what it raises ends that."""
    before = _while_waiting.set(look)
    try:
        yield
    finally:
        _while_waiting.reset(before)


def look_while_waiting() -> None:
    """What the context's `while_waiting` is given, if anything; to be called while this process waits for data."""
    look = _while_waiting.get()
    if look is not None:
        look()
