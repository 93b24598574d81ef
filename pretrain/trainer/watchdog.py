"""Ends a run that hangs, and says where: threads on each rank watch what the rank does, and the other ranks.

If a phase takes longer than its limit, every rank ends with `HUNG`: each prints what it is doing, the stacks of its
threads and of its data workers, and the files that are being read. A rank that fails tells the others why, and they end
within seconds. One that is killed, stopped or lost with its node is noticed by its silence.

Ranks talk through torch's store, over a connection of the watchdog's own: a rank that hangs may be holding the other.
"""

import contextlib
import faulthandler
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from data.workers import print_stacks_of_workers, running_workers
from pretrain.trainer.attempt import mark_attempt, mark_bad_node, node_name, try_briefly
from pretrain.trainer.config import WatchdogConfig
from pretrain.trainer.launch import World, exit_process, has_ended, launchers
from pretrain.trainer.meeting import connect, meeting_store
from pretrain.trainer.phases import current_phase
from pretrain.trainer.signals import told_to_stop

HUNG = 75  # EX_TEMPFAIL of sysexits.h, "the user is invited to retry": slurm/_train.sh requeues
POLL = 1.0  # seconds between checks
_HEARTBEAT = 5  # polls between a rank's signs of life
_LEFT = b"left"  # the last sign of life of a rank that ends by itself
_GRACE = 10.0  # seconds in which a rank may end by itself, with its own error, once another has ended
_LAST_WORDS = 30.0  # seconds after which a rank that cannot even report that it hangs ends all the same
_READING = {"x86_64": {0, 17, 19, 295}, "aarch64": {63, 65, 67, 69}}  # system calls read, pread64, readv, preadv
_log = logging.getLogger(__name__)


class Watchdog:
    """Watches within its context, on every rank.

    Args:
        config: the limits, in minutes; 0 is no limit.
        world: the ranks, which `meet` as soon as they have started.
    """

    def __init__(self, config: WatchdogConfig, world: World):
        self._config, self._world = config, world
        self._store: dist.Store | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        # A thread of its own: if the process that has the store is stopped, the store gives no answer and no error.
        self._listener = threading.Thread(target=self._follow_others, name="watchdog's store", daemon=True)
        self._asked = 0.0  # when the store was asked something that it has not answered yet; 0: nothing
        self._ending = threading.Lock()
        self._polls = 0
        self._launchers = launchers()
        self._is_orphan = False
        self._heard: dict[int, tuple[bytes, float]] = {}  # by rank: its last sign of life, and when it came
        self._told: dict[str, Any] | None = None  # how the first rank to end did so
        self._answered = time.monotonic()  # when the store last did

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        self._listener.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        for thread in (self._thread, self._listener):
            thread.join(POLL)

    def tell(self, problem: str) -> None:
        """Tells the others before this rank ends with an error: they end, too, and say that it was this one's."""
        with contextlib.suppress(RuntimeError):  # another rank, which had the store, has ended first
            if store := self._join():
                self._publish(store, problem, hung=False)
            if store and self._world.is_main:
                time.sleep(2 * POLL)  # the store may be in this process: wait until all have read it

    def cause(self) -> str:
        """Why another rank has ended, if it has told so; '' otherwise."""
        with contextlib.suppress(RuntimeError):
            if store := self._join():
                self._listen(store)
        return "" if self._told is None else str(self._told["problem"])

    def find_lost(self) -> list[str]:
        """Names the ranks that give no sign of life, on the main rank after its connection to another one broke.

        Every other rank that was left says here that it is not the lost one, and gets an empty list.
        """
        with contextlib.suppress(RuntimeError):
            if self._world.is_main and (store := self._join()):
                before = self._signs(store)
                time.sleep(1.5 * _HEARTBEAT * POLL)
                after = self._signs(store)
                return [_rank_name(rank, sign) for rank, sign in after.items() if _LEFT != sign == before[rank]]
        self.leave()
        return []

    def leave(self) -> None:
        """Tells the main rank that this one ends by itself: it is not lost, and its silence is no fault of its node."""
        self._closed.set()  # no more signs of life, which would replace this one
        if self._listener.is_alive():
            self._listener.join(POLL)
        with contextlib.suppress(RuntimeError):
            if not self._listener.is_alive() and (store := self._join()):  # otherwise the store does not answer
                store.set(f"alive/{self._world.rank}", _LEFT.decode())

    def _watch(self) -> None:
        while not self._closed.wait(POLL):
            self._check_limit()
            self._check_launcher()
            self._check_answer()

    def _follow_others(self) -> None:
        while not self._closed.wait(POLL):
            self._asked = time.monotonic()
            self._look_at_others()
            self._asked = 0.0

    def _waits_for_answer(self, seconds: float) -> bool:
        asked = self._asked
        return asked > 0 and time.monotonic() - asked > seconds

    def _check_answer(self) -> None:
        limit = self._config.silent_minutes
        if limit and self._waits_for_answer(60 * limit):
            silence = f"rank 0, or the launcher, has not answered for watchdog.silent_minutes={limit:g} minutes"
            self._end(f"{silence}: it was stopped, or its node is lost", HUNG)

    def _join(self) -> dist.Store | None:
        """The store, connected as soon as this rank has met the others; None until then."""
        if self._store is None and self._world.size > 1 and meeting_store() is not None:
            self._store = dist.PrefixStore("watchdog", connect(timedelta(seconds=_GRACE)))
        return self._store

    def _check_limit(self) -> None:
        phase = current_phase()
        if phase is None:
            return
        limit, minutes = getattr(self._config, phase.limit), (time.monotonic() - phase.start) / 60
        if limit and minutes > limit:
            problem = f"{phase.name} has taken longer than watchdog.{phase.limit}={limit:g} minutes"
            self._end(f"{self._name}: {problem}", HUNG, tell=True)

    def _check_launcher(self) -> None:
        """Saves and stops if the launcher has ended: without it, nobody could stop the run any more."""
        if not self._is_orphan and (ended := [process.pid for process in self._launchers if has_ended(process)]):
            self._is_orphan = True
            _log.warning("the launcher (process %d) has ended: this rank saves and stops", ended[0])
            os.kill(os.getpid(), signal.SIGTERM)

    def _look_at_others(self) -> None:
        try:
            store = self._join()
            if store is None:
                return
            self._polls += 1  # the first sign of life comes at once
            if self._polls % _HEARTBEAT == 1:
                store.set(f"alive/{self._world.rank}", f"{self._polls} {node_name()}")
            self._listen(store)
            if self._told is not None:
                self._follow(**self._told)
            if self._world.is_main and self._polls % _HEARTBEAT == 0:
                self._check_silence(store)
            self._answered = time.monotonic()
        except RuntimeError as error:  # torch's network errors
            # torchrun's store ends with torchrun, and then a checkpoint must still be saved.
            if time.monotonic() - self._answered > _GRACE and not self._is_orphan:
                # Rank 0 may have stopped at the signal that this rank, which is still busy, has received, too.
                stopped, why = told_to_stop() and not self._world.is_main, str(error).splitlines()[0]
                self._end(f"rank 0, or the launcher, has ended or does not answer ({why})", 0 if stopped else 1)

    def _listen(self, store: dist.Store) -> None:
        if self._told is None and store.check(["ended"]):
            self._told = json.loads(store.get("ended"))

    def _check_silence(self, store: dist.Store) -> None:
        """On the main rank alone, so that requests to the store grow with the number of ranks, not its square."""
        limit, now = self._config.silent_minutes, time.monotonic()
        for rank, sign in self._signs(store).items():
            if sign == _LEFT and told_to_stop():  # at the same signal, at which this rank is going to stop as well
                self._heard.pop(rank, None)
            elif self._heard.get(rank, (None, 0.0))[0] != sign:
                self._heard[rank] = (sign, now)
            elif limit and now - self._heard[rank][1] > 60 * limit:
                if node := _node(sign):
                    try_briefly(mark_bad_node, node)
                who = _rank_name(rank, sign)
                silence = f"nothing was heard from {who} for watchdog.silent_minutes={limit:g} minutes"
                self._end(f"{silence}: it was killed or stopped, or its node is lost", HUNG, tell=True)

    def _signs(self, store: dist.Store) -> dict[int, bytes]:
        """The last sign of life of each rank but the main one, empty before its first."""
        keys = {rank: f"alive/{rank}" for rank in range(1, self._world.size)}
        return {rank: store.get(key) if store.check([key]) else b"" for rank, key in keys.items()}

    def _follow(self, rank: int, problem: str, hung: bool) -> None:
        """Ends like another rank, unless this one ends by itself in time."""
        if rank == self._world.rank:
            return
        if hung:
            self._end(problem, HUNG)
        if not self._closed.wait(_GRACE):
            self._end(f"rank {rank} has ended: {problem}", 1)

    def _publish(self, store: dist.Store, problem: str, hung: bool) -> None:
        told = json.dumps({"rank": self._world.rank, "problem": problem, "hung": hung})
        store.compare_set("ended", "", told)  # the first cause stays

    @property
    def _name(self) -> str:
        return f"rank {self._world.rank} on {node_name()}"

    def _end(self, problem: str, code: int, tell: bool = False) -> None:
        """Reports why, and where this rank is; the process ends even if it can neither tell the others nor write."""
        with self._ending:  # only one thread, or the other would end the process before all ranks have been told
            faulthandler.dump_traceback_later(_LAST_WORDS, exit=True)
            if code == HUNG:  # first: whatever comes next may hang, and without the mark the job is not requeued
                try_briefly(mark_attempt, "hung")
            if tell and self._store is not None and not self._waits_for_answer(_GRACE):
                with contextlib.suppress(RuntimeError):
                    self._publish(self._store, problem, hung=code == HUNG)
            _say("%s: %s", self._world.error, problem)
            if code == HUNG:
                try_briefly(self._report_position, problem, seconds=_LAST_WORDS / 3)
            if tell:
                time.sleep(2 * POLL)  # let all read it before a broken connection tells them less
            exit_process(code)

    def _report_position(self, problem: str) -> None:
        for name in self._quiet():
            if name not in problem:
                _say("no sign of life from %s either: it was killed or stopped, or its node is lost", name)
        try:
            _say("%s is at: %s", self._name, _position())
        except OSError as error:  # there is no folder for temporary files
            _say("%s cannot tell where it is: %s", self._name, error)
        if workers := ", ".join(map(str, running_workers())):
            _say("the stacks of the data workers of %s, processes %s, follow on stderr", self._name, workers)
            sys.stderr.flush()
            print_stacks_of_workers()
            time.sleep(POLL)

    def _quiet(self) -> list[str]:
        """The ranks that have missed several signs of life; only the main rank knows."""
        late = time.monotonic() - 3 * _HEARTBEAT * POLL
        return [_rank_name(rank, sign) for rank, (sign, since) in sorted(self._heard.items()) if since < late]


def _say(message: str, *arguments: object) -> None:
    """Logs an error. Each has its own thread: it reaches the console even if an earlier one hangs at the log file."""
    try_briefly(_log.error, message, *arguments)


def _node(sign: bytes) -> str:
    return sign.decode().partition(" ")[2]


def _rank_name(rank: int, sign: bytes) -> str:
    return f"rank {rank} on {_node(sign)}" if _node(sign) else f"rank {rank}"


def _position() -> str:
    """The phase, the files being read, and the stacks of all threads."""
    phase = current_phase()
    lines = [phase.name if phase else "an unnamed phase"]
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error, OSError):
            state = f"process {process.pid} ({process.status()})"
            lines += [f"{state} is reading {path}" for path in files_being_read(process.pid)]
            if process.status() == psutil.STATUS_STOPPED:
                lines.append(f"{state}: it was stopped (SIGSTOP)")
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        lines.append(file.read())
    return "\n".join(lines)


def files_being_read(pid: int) -> list[str]:
    """Files that threads of a process are reading in a system call; none if the kernel does not tell."""
    numbers, found = _READING.get(os.uname().machine, set()), []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread has ended, or the kernel does not let us look
            number, _, rest = (task / "syscall").read_text().partition(" ")
            if number.isdigit() and int(number) in numbers:
                path = os.readlink(f"/proc/{pid}/fd/{int(rest.split()[0], 16)}")
                if path.startswith("/"):  # neither a pipe nor a socket
                    found.append(path)
    return found
