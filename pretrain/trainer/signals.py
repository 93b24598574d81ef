"""Signals stop a run at a step boundary, on which all ranks agree."""

import signal
import time
from collections import Counter
from types import FrameType

import torch
import torch.distributed as dist

from pretrain.trainer.phases import UNLIMITED

# Slurm's warning before the time limit (--signal), termination by a scheduler or launcher, Ctrl-C, a closed terminal.
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal stopped the run at a step boundary; everything is saved.

    Attributes:
        lacks_data: whether the run was waiting for images, which may never come.
    """

    lacks_data = False


ROUND_SECONDS = 5.0  # how long a rank that waits for data waits for the others to say that they do, too

AGAIN = 1.0  # seconds after which a second SIGINT is another Ctrl-C: a launcher may pass the first one on again

_received: list[int] = []
_interrupted: list[float] = []  # when the first Ctrl-C came


def watch_signals() -> None:
    """Records signals from now on instead of ending the process; `StopRequest` acts on them at a step boundary."""
    for number in _SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup: the run is to go on
            signal.signal(number, _remember)


def told_to_stop() -> bool:
    """Whether this process has received a signal."""
    return bool(_received)


def stop_if_told(waits_for: str) -> None:
    """Raises Stopped if this process has received a signal; called while it waits for something at the start."""
    if _received:
        raise Stopped(f"stopped by a signal while waiting for {waits_for}; run the same command again to continue")


def _remember(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    if number == signal.SIGINT:
        if _interrupted and time.monotonic() - _interrupted[0] > AGAIN:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        _interrupted.append(time.monotonic())


class StopRequest:
    """Whether any rank was told to stop."""

    def __init__(self) -> None:
        # On the CPU, so that agreeing never waits for the device.
        self._group = dist.new_group(backend="gloo", timeout=UNLIMITED)
        self._store = dist.distributed_c10d._get_default_store()
        self._rounds: Counter[int] = Counter()  # of `agreed_while_waiting`, by step

    def agreed(self) -> str | None:
        """The signal that any rank has received, or None; the same on all ranks."""
        number = torch.tensor(_received[0] if _received else 0)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group)
        return signal.Signals(int(number)).name if number else None

    def agreed_while_waiting(self, step: int) -> str | None:
        """Like `agreed`, on a rank that waits for data, which may never come; called now and then, after `step`.

        It cannot call `agreed`, which others reach only with its gradients. So ranks that wait tell each other about a
        signal through the store, and stop if all ranks are waiting, within `ROUND_SECONDS`.

        Returns:
            The signal on all ranks, or None on all of them.
        """
        try:
            return self._agree_by_store(step)
        except RuntimeError:  # the launcher was killed, and its store with it: with the data, `agreed` will do
            return None

    def _agree_by_store(self, step: int) -> str | None:
        store, told = self._store, "stop/signal"
        if _received:
            store.set(told, str(_received[0]))
        elif not store.check([told]):
            return None
        this_round = f"stop/{step}/{self._rounds[step]}"
        self._rounds[step] += 1
        decision, deadline = f"{this_round}/decision", time.monotonic() + ROUND_SECONDS
        if store.add(f"{this_round}/ranks", 1) == dist.get_world_size():
            store.compare_set(decision, "", "stop")
        while not store.check([decision]):
            if time.monotonic() > deadline:
                store.compare_set(decision, "", "wait")  # unless the last rank has decided just now
            time.sleep(0.05)
        return signal.Signals(int(store.get(told))).name if store.get(decision) == b"stop" else None
