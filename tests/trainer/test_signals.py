"""Signals: which of them stop a run, and how ranks that wait for data agree to stop."""

import signal
import threading
from collections import Counter

import pytest
import torch.distributed as dist

from pretrain.trainer import signals
from pretrain.trainer.signals import StopRequest


@pytest.mark.parametrize(("before", "watched"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_closed_terminal_stops_a_run_unless_nohup_started_it(
    before: signal.Handlers, watched: bool, monkeypatch: pytest.MonkeyPatch
):
    handlers = dict.fromkeys(signals._SIGNALS, signal.SIG_DFL) | {signal.SIGHUP: before}
    monkeypatch.setattr(signal, "getsignal", handlers.get)
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    signals.watch_signals()
    assert (handlers[signal.SIGHUP] == signals._remember) == watched
    assert handlers[signal.SIGTERM] == signals._remember


def test_only_a_second_ctrl_c_interrupts_at_once(monkeypatch: pytest.MonkeyPatch):
    """Neither a SIGTERM before the Ctrl-C nor the launcher's copy of it counts as a second one."""
    for name in ("_received", "_interrupted"):
        monkeypatch.setattr(signals, name, [])
    times = iter([100.0, 100.1, 100.1, 102.0, 102.0])
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(times))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
        signals._remember(number, None)
    with pytest.raises(KeyboardInterrupt):
        signals._remember(signal.SIGINT, None)
    assert signals._received == [signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGINT]


@pytest.fixture
def sigterm_received(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has received SIGTERM, and a round of agreement is short."""
    monkeypatch.setattr(signals, "_received", [int(signal.SIGTERM)])
    monkeypatch.setattr(signals, "ROUND_SECONDS", 0.3)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)


def ranks_of_one_run(count: int) -> list[StopRequest]:
    store, ranks = dist.HashStore(), []
    for _ in range(count):
        rank = StopRequest.__new__(StopRequest)  # its process group would need several processes
        rank._store, rank._rounds = store, Counter()
        ranks.append(rank)
    return ranks


def ask(ranks: list[StopRequest], step: int, times: int = 1) -> list[str | None]:
    """Lets all ranks ask in parallel, each up to `times` times or until told to stop, and returns the last answers."""
    answers: list[str | None] = [None] * len(ranks)

    def wait(number: int) -> None:
        for _ in range(times):
            answers[number] = answers[number] or ranks[number].agreed_while_waiting(step)

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return answers


def test_ranks_that_all_wait_stop_together(sigterm_received: None):
    assert ask(ranks_of_one_run(3), step=7) == ["SIGTERM"] * 3


def test_ranks_stop_only_once_all_of_them_wait(sigterm_received: None):
    """Two ranks wait after step 7. The third one is computing, and waits with them only after step 8."""
    ranks = ranks_of_one_run(3)
    assert ask(ranks[:2], step=7, times=2) == [None, None]
    assert ask(ranks[1:2], step=8) == [None]
    assert ask(ranks, step=8, times=20) == ["SIGTERM"] * 3


def test_rank_without_a_signal_stops_with_the_others(sigterm_received: None, monkeypatch: pytest.MonkeyPatch):
    ranks = ranks_of_one_run(3)
    assert ask(ranks[:1], step=7) == [None]
    monkeypatch.setattr(signals, "_received", [])
    assert ask(ranks, step=7, times=20) == ["SIGTERM"] * 3


def test_without_a_store_a_signal_is_agreed_on_later(sigterm_received: None):
    """The launcher was killed, and its store with it."""

    class DeadStore:
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("Broken pipe")

    (rank,) = ranks_of_one_run(1)
    rank._store = DeadStore()
    assert rank.agreed_while_waiting(7) is None


def test_without_a_signal_ranks_do_not_wait_for_each_other(sigterm_received: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(signals, "_received", [])
    monkeypatch.setattr(signals, "ROUND_SECONDS", 1000.0)
    assert ask(ranks_of_one_run(2), step=7) == [None, None]
