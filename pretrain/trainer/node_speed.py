"""Measures how fast each node is at a short matrix product and an all-reduce, and finds the slow ones."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pretrain.trainer.attempt import node_name
from pretrain.trainer.launch import World, ranks_on_node
from pretrain.trainer.main import said_once
from pretrain.trainer.phases import report_if_slow
from pretrain.trainer.preflight import Fault, named, refuse_faults

_REPEATS = 5  # of a measurement; the best one counts


@dataclass(frozen=True)
class Speed:
    """How fast a rank is.

    Attributes:
        product: seconds of a matrix product.
        exchange: seconds of an all-reduce with a rank of a neighboring node, the faster of two; 0 if there is none.
    """

    rank: int
    node: str
    product: float
    exchange: float


def measure_speed(world: World, device: torch.device) -> Speed:
    """Measures this rank in a second or two; called by all ranks together, with a process group."""
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 512
    matrix = torch.ones(size, size, dtype=torch.bfloat16 if on_gpu else torch.float32, device=device)
    product = _best_time(lambda: torch.mm(matrix, matrix), device)
    mine = torch.ones(2**24 if on_gpu else 2**18, device=device)
    dist.all_reduce(mine)
    other, times, on_node = torch.empty_like(mine), [], _agreed_ranks_on_node(world)
    for turn in (0, 1):
        peer = neighbor(world.rank, world.size, on_node, turn)
        if peer is not None:
            times.append(_best_time(functools.partial(_add_up, mine, other, peer), device))
    dist.barrier()
    return Speed(world.rank, node_name(), product, min(times, default=0.0))


def _agreed_ranks_on_node(world: World) -> int:
    """How many ranks each node has; 1 if nodes differ, since all ranks must find the same pairs."""
    if world.size == 1:
        return 1
    counts = [0] * world.size
    dist.all_gather_object(counts, ranks_on_node(world))
    return counts[0] if len(set(counts)) == 1 else 1


def neighbor(rank: int, size: int, on_node: int, turn: int) -> int | None:
    """The rank in the same place on a neighboring node; None if there is none.

    Turn 0 pairs even nodes with the next node, and turn 1 odd ones, so that all pairs are busy at once. With a single
    node, each of its ranks counts as a node.
    """
    if size % on_node or size == on_node:
        on_node = 1
    nodes, node = size // on_node, rank // on_node
    peer = node + 1 if node % 2 == turn else node - 1
    if nodes % 2 == 0:
        peer %= nodes
    return peer * on_node + rank % on_node if nodes > 1 and 0 <= peer < nodes else None


def _add_up(mine: torch.Tensor, other: torch.Tensor, peer: int) -> None:
    """An all-reduce of two ranks without a process group: with many nodes, making the groups would take long."""
    sent = dist.P2POp(dist.isend, mine, peer)
    received = dist.P2POp(dist.irecv, other, peer)
    for work in dist.batch_isend_irecv([sent, received]):
        work.wait()
    other.add_(mine)


def _best_time(compute: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(_REPEATS + 1):  # the first one warms up
        start = time.perf_counter()
        compute()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def find_slow(speeds: Sequence[Speed], factor: float) -> Fault | None:
    """The nodes above `factor` times the median in one measurement; with two nodes, none can be above twice."""
    for name, what in (("product", "a matrix product"), ("exchange", "an all-reduce with its neighbors")):
        median = statistics.median(getattr(speed, name) for speed in speeds)
        slow = [speed for speed in speeds if getattr(speed, name) > factor * median]
        if slow and median:
            nodes = tuple(dict.fromkeys(speed.node for speed in slow))
            worst = max(getattr(speed, name) for speed in slow)
            times = f"{1000 * worst:.2f} ms for {what}, against a median of {1000 * median:.2f} ms over all ranks"
            return Fault(
                f"{named(slow)} took {times}: exclude it, or set watchdog.slow_factor=0 to train anyway",
                nodes,
            )
    return None


def check_speed(world: World, device: torch.device, factor: float) -> list[Speed]:
    """The speeds of all ranks, on the main rank; called by all ranks together, with a process group.

    Raises:
        ValueError: a node takes more than `factor` times as long as the median; not checked if `factor` is 0.
    """
    with report_if_slow("measuring the speed of all nodes"):
        mine = measure_speed(world, device)
    with said_once(world.rank):
        return refuse_faults(world, mine, lambda speeds: find_slow(speeds, factor) if factor else None)
