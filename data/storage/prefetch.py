"""Fetches the shards of a pass while they are read: the group needed now, and the next one."""

import functools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from data.order import StepGroup
from data.storage.cache import ShardCache, unpin
from data.storage.client import Object
from data.storage.location import Remote

THREADS = 8  # shards that a process fetches at once; the processes of a node share the work
_CLOSING = 2.0  # seconds for threads to end; one that waits for a store ends with the process


class Prefetcher:
    """Fetches in threads of one process, which must not be a forked one.

    All processes of a node follow the same plan: while one fetches a shard, the others wait for it.
    """

    def __init__(
        self, cache: ShardCache, shards: Sequence[tuple[Remote, Object]], plan: Iterable[StepGroup], ahead: int = 1
    ) -> None:
        """Starts fetching.

        Args:
            cache: where shards go.
            shards: every shard, by its number in the plan, with its size and version.
            plan: groups in the order in which they are needed; read in a thread.
            ahead: groups to fetch beyond those needed now.
        """
        self._cache, self._shards, self._ahead = cache, shards, ahead
        self._changed = threading.Condition()
        self._needed, self._done, self._covered = -1, -1, -1.0  # steps
        self._loaded: list[tuple[StepGroup, list[int]]] = []  # with the descriptors of their shards
        self._missing = 0  # shards of the group that is being fetched
        self._error: BaseException | None = None
        self._stop = False
        self._queue: queue.SimpleQueue[tuple[int, StepGroup, list[int]] | None] = queue.SimpleQueue()
        work = [lambda: self._load_all(iter(plan)), *[self._fetch] * THREADS]
        self._threads = [threading.Thread(target=self._guarded, args=(part,), daemon=True) for part in work]
        for thread in self._threads:
            thread.start()

    def need(self, step: int) -> None:
        """Announces that `step` is needed: its groups are fetched, and `ahead` more."""
        with self._changed:
            self._needed = max(self._needed, step)
            self._changed.notify_all()

    def done(self, step: int) -> None:
        """Announces that all steps up to `step` have been read: what no later one needs may be deleted."""
        with self._changed:
            self._done = max(self._done, step)
            while self._loaded and self._loaded[0][0].last_step <= self._done:
                self._release(self._loaded.pop(0)[1])

    def check(self) -> bool:
        """Whether shards needed now are still being fetched; raises the error that ended fetching."""
        with self._changed:
            if self._error is not None:
                raise self._error
            return self._covered < self._needed

    def close(self) -> None:
        """Ends the threads and releases all shards."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        for _ in range(THREADS):
            self._queue.put(None)
        deadline = time.monotonic() + _CLOSING
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        with self._changed:
            while self._loaded:
                self._release(self._loaded.pop()[1])

    def _load_all(self, plan: Iterator[StepGroup]) -> None:
        """Loads group by group: the next one begins when the one before it is complete."""
        for group in plan:
            with self._changed:
                self._covered = group.first_step - 1
                self._changed.notify_all()
                while not self._stop and self._is_early(group):
                    self._changed.wait()
                if self._stop:
                    return
                descriptors: list[int] = []
                self._loaded.append((group, descriptors))
                self._missing = len(group.shards)
                for shard in group.shards:
                    self._queue.put((shard, group, descriptors))
                while not self._stop and self._missing:
                    self._changed.wait()
        with self._changed:
            self._covered = float("inf")
            self._changed.notify_all()

    def _is_early(self, group: StepGroup) -> bool:
        beyond = sum(not self._is_needed(loaded) for loaded, _ in self._loaded)
        return not self._is_needed(group) and beyond >= self._ahead

    def _is_needed(self, group: StepGroup) -> bool:
        return group.first_step <= self._needed

    def _fetch(self) -> None:
        while (task := self._queue.get()) is not None and not self._stop:
            shard, group, descriptors = task
            urgent = functools.partial(self._is_needed, group)
            descriptor = self._cache.pin(*self._shards[shard], lambda: self._stop, urgent)
            with self._changed:
                if descriptor is not None:
                    descriptors.append(descriptor)
                    if self._stop:
                        self._release(descriptors)
                self._missing -= 1
                self._changed.notify_all()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # whatever it is, the main thread must not wait forever
            with self._changed:
                self._error = self._error or error
                self._stop = True
                self._changed.notify_all()

    @staticmethod
    def _release(descriptors: list[int]) -> None:
        while descriptors:
            unpin(descriptors.pop())
