"""Signals end a run at a step boundary, when all ranks have agreed on it."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

# Slurm's warning before the time limit (--signal), a scheduler's or launcher's end, and Ctrl-C.
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal ended the run at a step boundary; everything is saved."""


_received: list[int] = []


def watch_signals() -> None:
    """Remembers signals from now on, instead of dying of them; `StopRequest` acts on them at a step boundary."""
    for number in _SIGNALS:
        signal.signal(number, _remember)


def _remember(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait


class StopRequest:
    """Whether any rank was told to stop."""

    def __init__(self) -> None:
        # On the CPU, so that agreeing never waits for the device.
        self._group = dist.new_group(backend="gloo")

    def agreed(self) -> str | None:
        """The signal that any rank has received, the same answer on all of them."""
        number = torch.tensor(_received[0] if _received else 0)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group)
        return signal.Signals(int(number)).name if number else None
