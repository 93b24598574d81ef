"""What a loader needs for shards in a store: room for them, and fetching them while others are read."""

import contextlib
import math
import resource
import time
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

import numpy as np

from data.index_file import Index
from data.order import StepGroup
from data.storage.cache import POLL, ShardCache
from data.storage.prefetch import Prefetcher
from data.waiting import look_while_waiting

Request = TypeVar("Request")

_OTHER_FILES = 1024  # descriptors that a process needs besides those of shards
_SUGGESTED = (256, 128, 64, 32, 16, 8, 4, 2, 1)  # shards per group


class Fetching(Protocol):
    """What a loader uses of a `Prefetcher`."""

    def need(self, step: int) -> None: ...

    def done(self, step: int) -> None: ...

    def check(self) -> bool: ...


class _Local:
    """Local shards need no fetching."""

    def need(self, step: int) -> None:
        pass

    def done(self, step: int) -> None:
        pass

    def check(self) -> bool:
        return False


@contextlib.contextmanager
def fetching(index: Index, plan: Iterable[StepGroup], ahead: int = 1) -> Iterator[Fetching]:
    """Fetches the shards of a plan as they are needed within this context, if they are in a store.

    Args:
        index: the shards.
        plan: see `Prefetcher`; not read for local shards.
        ahead: groups to fetch beyond those needed now.
    """
    if not index.is_remote:
        yield _Local()
        return
    shards = [index.stored(shard) for shard in range(len(index.shards))]
    prefetcher = Prefetcher(ShardCache(index.cache), shards, plan, ahead)
    try:
        yield prefetcher
    finally:
        prefetcher.close()


def announced(
    requests: Iterable[Request], first_step: int, per_step: int, fetcher: Fetching, wait: bool
) -> Iterator[Request]:
    """Passes requests on, after telling the fetcher which step each belongs to.

    Args:
        requests: `per_step` for each step.
        first_step: step of the first request.
        per_step: requests per step.
        fetcher: from `fetching`.
        wait: whether to wait for the shards first, because the requests are read in this very process.
    """
    for number, request in enumerate(requests):
        fetcher.need(first_step + number // per_step)
        while fetcher.check() and wait:
            look_while_waiting()
            time.sleep(POLL / 10)
        yield request


def shard_steps(index: Index, samples: np.ndarray, per_step: int) -> Iterator[StepGroup]:
    """Yields the shards of ascending samples, each with the first and last step that read it."""
    shards, first = np.unique(np.searchsorted(index.shard_ends, samples, side="right"), return_index=True)
    last = np.append(first[1:], len(samples)) - 1
    for shard, start, stop in zip(
        shards.tolist(), (first // per_step).tolist(), (last // per_step).tolist(), strict=True
    ):
        yield StepGroup(start, stop, (shard,))


def check_room(index: Index, size: int, in_flight: int) -> None:
    """Makes sure that the cache can hold everything that is needed at once.

    Args:
        index: the shards; nothing is checked for local ones.
        size: shards per group; 0: all of them are one group.
        in_flight: samples that are read before the first of them is used.

    Raises:
        ValueError: it cannot; says which settings would work.
    """
    if not index.is_remote:
        return
    cache, sizes = index.cache, np.sort(index.shard_bytes)
    total, needed = int(sizes.sum()), _needed(index, size, in_flight)[1]
    if needed > cache.limit:
        fits = next((n for n in _SUGGESTED if n < len(sizes) and _needed(index, n, in_flight)[1] <= cache.limit), 0)
        smaller = f"data.shuffle_shards={fits}, or " if fits and size != 1 else ""
        what = (
            f"{_needed(index, size, in_flight)[0]} groups of data.shuffle_shards={size} are needed at once, up to "
            f"{needed / 1e9:.3g} GB"
            if size
            else f"data.shuffle_shards=0 shuffles all {total / 1e9:.3g} GB at once"
        )
        raise ValueError(
            f"data.cache_gb={cache.gigabytes:g} is not enough for {index.root}: {what}; set {smaller}data.cache_gb to "
            f"at least {math.ceil(needed / 1e7) / 100:g}"
        )
    _allow_files(_needed(index, size, in_flight)[2], size)


def _needed(index: Index, size: int, in_flight: int) -> tuple[int, int, int]:
    """The most groups, bytes and shards that are needed at once."""
    sizes, samples, count = np.sort(index.shard_bytes), np.sort(index.shard_sizes), len(index.shards)
    if not size:
        return 1, int(sizes.sum()), count
    number = -(-count // size)
    fewest, most = count // number, -(-count // number)  # shards per group
    groups = 1 + max(1, -(-in_flight // int(samples[:fewest].sum())))
    return groups, min(groups * int(sizes[-most:].sum()), int(sizes.sum())), min(groups * most, count)


def _allow_files(shards: int, size: int) -> None:
    """Raises the limit on open files if necessary: each shard in use is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * shards + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ValueError(
            f"data.shuffle_shards={size}: {shards} shards in use are as many open files, but this process may only "
            f"have {hard}: raise the limit with `ulimit -n {needed}`, or lower data.shuffle_shards"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
