"""Checks before a training that all ranks have the same code, recipe and data, and that every node can train.

Ranks exchange what they find through the store at which they have met, so nothing here needs a process group. The main
rank compares, and all ranks refuse with the same sentence, which names the nodes.
"""

import functools
import hashlib
import itertools
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from data.waiting import while_waiting
from pretrain.trainer.attempt import mark_bad_node, node_name
from pretrain.trainer.launch import World
from pretrain.trainer.main import said_once
from pretrain.trainer.meeting import meet, meeting_store
from pretrain.trainer.phases import report_if_slow
from pretrain.trainer.retention import folder_size, leftovers
from pretrain.trainer.run_folder import RunFolder, package_version
from pretrain.trainer.signals import stop_if_told

_ROOT = Path(__file__).parents[2]
_PROJECT = ("data", "pretrain", "downstream")
_LEAST_FREE = 2**18  # bytes
_POLL = 0.1
_ADVICE = {
    "code": "use the same checkout of this project on all nodes",
    "versions": "use the same environment on all nodes",
    "recipe": "give all ranks the same recipe and keys",
    "index": "make sure that all nodes see the same shards",
}
_WHAT = {"code": "code", "versions": "versions", "recipe": "recipe", "index": "index of the shards"}
Loaded = TypeVar("Loaded")


class OfRank(Protocol):
    """What is known about a rank."""

    @property
    def rank(self) -> int:
        """Its number."""

    @property
    def node(self) -> str:
        """The name of its node."""


AnyFacts = TypeVar("AnyFacts", bound=OfRank)
_exchanges = itertools.count()


@dataclass(frozen=True)
class Facts:
    """What a rank finds out about its node, and about what it is going to train.

    Attributes:
        code: a digest of the project's files; '' on all but the first rank of a node.
        versions: of torch, DeepSpeed and Triton.
        recipe: a digest of all keys.
        index: the fingerprint of the training samples.
        gpus: how many this rank sees.
        only_gpu: the UUID of the GPU, if it sees a single one.
        free: bytes left on the disk of the run's folder.
        problem: why the data cannot be read or the folder cannot be written; '' if they can.
    """

    rank: int
    node: str
    code: str
    versions: str
    recipe: str
    index: str
    gpus: int
    only_gpu: str
    free: int
    problem: str = ""


def checked_start(
    world: World,
    folder: Path,
    recipe: str,
    load: Callable[[], Loaded],
    fingerprint: Callable[[Loaded], str],
) -> Loaded:
    """What `load` returns, if all ranks agree and every node can train; called first, by all ranks together.

    Args:
        folder: of the run; it need not exist.
        recipe: all keys, as text.
        load: reads the data's index; an error of it becomes one of the facts.
        fingerprint: of what it has loaded.

    Raises:
        ValueError: the first fault found, and its nodes; on all ranks.
        Stopped: as `meet`.
    """
    meet(world.rank, world.size)
    loaded: Any = None
    index, problem = "", ""
    try:
        with while_waiting(lambda: stop_if_told("another process that is building the index")):
            loaded = load()
        index = fingerprint(loaded)
    except (ValueError, OSError) as error:
        if world.size == 1:
            raise
        problem = str(error)
    mine = _look(world, folder, recipe, index, problem)
    with said_once(world.rank):
        refuse_faults(world, mine, find_fault)
    return loaded  # otherwise there was a problem


def _look(world: World, folder: Path, recipe: str, index: str, problem: str) -> Facts:
    versions = {name: package_version(name) for name in ("torch", "deepspeed", "triton")}
    existing, free = _existing(folder), 0
    with suppress(OSError):  # a disk that is gone has no room
        free = free_bytes(folder)
    if not problem and not os.access(existing, os.W_OK):
        problem = f"{existing} cannot be written to"
    return Facts(
        rank=world.rank,
        node=node_name(),
        code=project_digest() if world.local_rank == 0 else "",
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        recipe=hashlib.sha256(recipe.encode()).hexdigest()[:12],
        index=index[:12],
        gpus=torch.cuda.device_count(),
        only_gpu=str(torch.cuda.get_device_properties(0).uuid) if torch.cuda.device_count() == 1 else "",
        free=free,
        problem=problem,
    )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def free_bytes(folder: Path) -> int:
    """What is free for a run on its disk, including what the run deletes before it saves anything."""
    left = sum(folder_size(path) for path in leftovers(RunFolder(folder).checkpoints))
    return shutil.disk_usage(_existing(folder)).free + left


def room_problem(folder: Path, parameters: int) -> str | None:
    """Why a run's disk has no room for a checkpoint, if so: fp32 weights and AdamW's two moments.

    Args:
        folder: of the run; it need not exist.
        parameters: that are trained; a moving average comes on top.
    """
    needed, free = 12 * parameters, free_bytes(folder)
    if needed <= free:
        return None
    return (
        f"{folder}: a checkpoint takes at least {needed / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free: make "
        "room, or choose another folder by runs="
    )


@functools.cache
def project_digest() -> str:
    """A digest of the names and bytes of all Python files of this project."""
    digest = hashlib.sha256()
    for package in _PROJECT:
        for path in sorted((_ROOT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(_ROOT)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Fault:
    """What is wrong, and the nodes that a job should exclude."""

    problem: str
    nodes: tuple[str, ...] = ()


def find_fault(facts: Sequence[Facts]) -> Fault | None:
    """The first fault in the facts of all ranks, if any."""
    if (problem := facts[0].problem) and all(each.problem for each in facts):
        return Fault(problem)
    if failed := [each for each in facts if each.problem]:
        nodes = tuple(dict.fromkeys(each.node for each in failed))
        return Fault(f"{named(failed)} failed a check that passed on the other ranks: {failed[0].problem}", nodes)
    return _difference(facts) or _too_few_gpus(facts) or _full_disk(facts)


def _difference(facts: Sequence[Facts]) -> Fault | None:
    for name, what in _WHAT.items():
        values = [(each, getattr(each, name)) for each in facts if getattr(each, name)]
        counts = Counter(value for _, value in values)
        if len(counts) < 2:
            continue
        usual, times = counts.most_common(1)[0]  # in a tie, that of the lowest rank
        others = [each for each, value in values if value != usual]
        nodes = (
            tuple(dict.fromkeys(each.node for each in others)) if name != "recipe" and 2 * times > len(values) else ()
        )
        theirs = ", ".join(dict.fromkeys(getattr(each, name) for each in others))
        problem = f"different {what} on {named(others)}: {theirs}, but {usual} elsewhere; {_ADVICE[name]}"
        return Fault(problem, nodes)
    return None


def _too_few_gpus(facts: Sequence[Facts]) -> Fault | None:
    """A node that does not have a GPU for each of its ranks: each rank must see all of them, or one of its own."""
    if not any(each.gpus for each in facts):
        return None  # a training on CPUs
    for node, ranks in _by_node(facts).items():
        own = all(each.gpus == 1 for each in ranks) and len({each.only_gpu for each in ranks}) == len(ranks)
        if not own and min(each.gpus for each in ranks) < len(ranks):
            seen = min(each.gpus for each in ranks)
            return Fault(
                f"{node} has fewer visible GPUs than ranks ({seen} for {len(ranks)}): start one process per GPU",
                (node,),
            )
    return None


def _full_disk(facts: Sequence[Facts]) -> Fault | None:
    full = [each for each in facts if each.free < _LEAST_FREE]
    if not full:
        return None
    nodes = tuple(dict.fromkeys(each.node for each in full))
    left = f"{full[0].free / 2**10:.0f} KiB"
    problem = f"{named(full)} has only {left} left on the disk of the run's folder: make room, or choose another runs="
    return Fault(problem, nodes if len(full) < len(facts) else ())


def _by_node(facts: Sequence[AnyFacts]) -> dict[str, list[AnyFacts]]:
    nodes: dict[str, list[AnyFacts]] = {}
    for each in facts:
        nodes.setdefault(each.node, []).append(each)
    return nodes


def named(facts: Sequence[OfRank]) -> str:
    """'node2 (rank 4)': nodes and the first rank of each."""
    nodes = _by_node(facts)
    shown = [f"{node} (rank {ranks[0].rank})" for node, ranks in list(nodes.items())[:8]]
    return ", ".join(shown) + (f" and {len(nodes) - 8} more" if len(nodes) > 8 else "")


def refuse_faults(world: World, mine: AnyFacts, find: Callable[[Sequence[AnyFacts]], Fault | None]) -> list[AnyFacts]:
    """The facts of all ranks on the main rank, and [] on the others; called by all ranks together.

    Raises:
        ValueError: `find` finds a fault in them; on all ranks.
    """
    facts = [mine]
    store, number = meeting_store(), next(_exchanges)
    if store is not None:
        store.set(f"facts/{number}/{world.rank}", json.dumps(vars(mine)))
        others = range(1, world.size) if world.is_main else ()
        kind: Any = type(mine)
        facts += [kind(**json.loads(_wait_for(store, f"facts/{number}/{rank}", f"rank {rank}"))) for rank in others]
    problem = ""
    if world.is_main:
        fault = find(facts)
        problem = fault.problem if fault else ""
        for node in fault.nodes if fault else ():
            with suppress(OSError):  # then the job script excludes no node
                mark_bad_node(node)
        if store is not None:
            store.set(f"verdict/{number}", problem)
    else:
        assert store is not None
        problem = _wait_for(store, f"verdict/{number}", "the main rank")
    if problem:
        raise ValueError(problem)
    return facts if world.is_main else []


def _wait_for(store: dist.Store, key: str, whom: str) -> str:
    """What another rank says; polls for it, so that signals are noticed."""
    with report_if_slow(f"waiting for {whom}, which is still reading data or running checks"):
        while not store.check([key]):
            stop_if_told(whom)
            time.sleep(_POLL)
    return store.get(key).decode()
