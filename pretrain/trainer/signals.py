"""Signals stop a run at a step boundary, on which all ranks agree."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

# Slurm's warning before the time limit (--signal), a scheduler's or launcher's end, and Ctrl-C.
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal stopped the run at a step boundary; everything is saved."""


_received: list[int] = []


def watch_signals() -> None:
    """From now on signals are recorded instead of ending the process; `StopRequest` acts on them at a step boundary."""
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
        """The signal that any rank has received, or None; the same on all ranks."""
        number = torch.tensor(_received[0] if _received else 0)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group)
        return signal.Signals(int(number)).name if number else None
