"""Checks before training name ranks that differ and nodes that cannot train."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pretrain.trainer import node_speed, preflight
from pretrain.trainer.launch import World
from pretrain.trainer.node_speed import Speed, find_slow, measure_speed, neighbor
from pretrain.trainer.preflight import Facts, Fault, checked_start, find_fault, project_digest, refuse_faults

FACTS = Facts(0, "n0", "c0de", "torch 2.5", "rec", "idx", gpus=2, only_gpu="", free=2**40)


def facts_of_ranks(**changes: dict[int, object]) -> list[Facts]:
    """Facts of three nodes with two ranks each. `name={rank: value}` changes those of some ranks."""
    facts = [replace(FACTS, rank=rank, node=f"n{rank // 2}", code="" if rank % 2 else "c0de") for rank in range(6)]
    for name, values in changes.items():
        for rank, value in values.items():
            facts[rank] = replace(facts[rank], **{name: value})
    return facts


def test_ranks_that_agree_have_no_fault() -> None:
    assert find_fault(facts_of_ranks()) is None
    assert find_fault(facts_of_ranks()[:1]) is None


@pytest.mark.parametrize(
    ("changes", "message", "nodes"),
    [
        ({"code": {2: "old"}}, "different code on n1 (rank 2): old, but c0de elsewhere", ("n1",)),
        ({"code": {0: "old"}}, "different code on n0 (rank 0)", ("n0",)),
        (
            {"versions": {4: "torch 2.4", 5: "torch 2.4"}},
            "different versions on n2 (rank 4): torch 2.4, but",
            ("n2",),
        ),
        ({"recipe": {5: "other"}}, "different recipe on n2 (rank 5)", ()),
        ({"index": {2: "few", 3: "few"}}, "make sure that all nodes see the same shards", ("n1",)),
        ({"code": {2: "old", 4: "older"}}, "different code on n1 (rank 2), n2 (rank 4)", ()),
        (
            {"gpus": {2: 1, 3: 1}, "only_gpu": {2: "GPU-7", 3: "GPU-7"}},
            "n1 has fewer visible GPUs than ranks (1 for 2)",
            ("n1",),
        ),
        ({"gpus": {2: 0, 3: 0}}, "n1 has fewer visible GPUs than ranks (0 for 2)", ("n1",)),
        ({"free": {4: 0}}, "n2 (rank 4) has only 0 KiB left on the disk of the run's folder", ("n2",)),
        (
            {"problem": {3: "no shards"}},
            "n1 (rank 3) failed a check that passed on the other ranks: no shards",
            ("n1",),
        ),
        ({"problem": dict.fromkeys(range(6), "no shards")}, "no shards", ()),
    ],
)
def test_fault_names_the_difference_and_the_nodes(changes: dict, message: str, nodes: tuple[str, ...]) -> None:
    fault = find_fault(facts_of_ranks(**changes))
    assert fault is not None
    assert message in fault.problem
    assert fault.nodes == nodes


def test_one_gpu_per_rank_is_enough() -> None:
    own = {rank: str(rank % 2) for rank in range(6)}
    assert find_fault(facts_of_ranks(gpus=dict.fromkeys(range(6), 1), only_gpu=own)) is None
    assert find_fault(facts_of_ranks(gpus=dict.fromkeys(range(6), 0))) is None, "a training on CPUs"


def test_slow_node_is_named() -> None:
    speeds = [Speed(rank, f"n{rank}", 0.010, 0.020) for rank in range(4)]
    assert find_slow(speeds, 2) is None
    for slow, what in (
        (replace(speeds[2], product=0.021), "matrix product"),
        (replace(speeds[2], exchange=1), "all-red"),
    ):
        fault = find_slow([*speeds[:2], slow, speeds[3]], 2)
        assert fault is not None
        assert fault.nodes == ("n2",)
        assert "n2 (rank 2) took " in fault.problem
        assert what in fault.problem
        assert "watchdog.slow_factor=0" in fault.problem
    assert find_slow([replace(speeds[0], exchange=0.0)], 2) is None, "alone there is nothing to exchange"


def refuse_on_ranks(size: int, monkeypatch: pytest.MonkeyPatch, mine: Callable[[int], Facts]) -> list[object]:
    """Runs each rank in a thread, and returns what `refuse_faults` returned or raised on each of them."""
    store, results = dist.HashStore(), [None] * size
    monkeypatch.setattr(preflight, "meeting_store", lambda: store)
    monkeypatch.setattr(preflight, "_exchanges", iter([7] * size))

    def rank(number: int) -> None:
        try:
            results[number] = refuse_faults(World(number, size, number), mine(number), find_fault)
        except ValueError as error:
            results[number] = str(error)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


def test_all_ranks_get_the_same_verdict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOMAR_ATTEMPT", str(tmp_path / "attempt0"))
    facts = facts_of_ranks()
    assert refuse_on_ranks(6, monkeypatch, lambda rank: facts[rank]) == [facts, [], [], [], [], []]
    assert not list(tmp_path.iterdir())
    facts = facts_of_ranks(code={4: "old"})
    (message,) = set(refuse_on_ranks(6, monkeypatch, lambda rank: facts[rank]))
    assert "different code on n2 (rank 4)" in str(message)
    assert [path.name for path in tmp_path.iterdir()] == ["attempt0-bad-n2"], "the job's script leaves it out"


def test_single_rank_checks_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "meet", lambda rank, size: None)
    monkeypatch.setattr(preflight, "meeting_store", lambda: None)
    world, folder = World(0, 1, 0), tmp_path / "runs" / "new"
    assert checked_start(world, folder, "recipe", lambda: 5, str) == 5
    assert checked_start(world, folder, "recipe", lambda: None, lambda nothing: "") is None
    assert not folder.exists()

    def fail() -> int:
        raise ValueError("no shards")

    with pytest.raises(ValueError, match="no shards"):
        checked_start(world, folder, "recipe", fail, str)
    monkeypatch.setattr(preflight, "_LEAST_FREE", 2**70)
    with pytest.raises(ValueError, match="on the disk of the run's folder: make room"):
        checked_start(world, folder, "recipe", lambda: 5, str)
    assert len(project_digest()) == 12


def test_nodes_with_different_numbers_of_ranks_count_each_rank_as_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_gather_object(counts: list[int], mine: int) -> None:
        counts[:] = [6] * 6 + [2] * 2

    monkeypatch.setattr(node_speed.dist, "all_gather_object", all_gather_object)
    monkeypatch.setattr(node_speed, "ranks_on_node", lambda world: 6)
    assert node_speed._agreed_ranks_on_node(World(0, 8, 0)) == 1


@pytest.mark.parametrize(("size", "on_node"), [(2, 1), (3, 1), (8, 2), (6, 2), (16, 8), (4, 4), (5, 5)])
def test_ranks_are_paired_with_neighbors_on_other_nodes(size: int, on_node: int) -> None:
    for turn in (0, 1):
        peers = [neighbor(rank, size, on_node, turn) for rank in range(size)]
        for rank, peer in enumerate(peers):
            if peer is not None:
                assert peers[peer] == rank != peer
                assert size == on_node or peer // on_node != rank // on_node
                assert size == on_node or peer % on_node == rank % on_node
    assert all(any(neighbor(rank, size, on_node, turn) is not None for turn in (0, 1)) for rank in range(size))
    assert neighbor(0, 1, 1, 0) is None


def test_single_rank_measures_its_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    speed = measure_speed(World(0, 1, 0), torch.device("cpu"))
    assert 0 < speed.product < 10
    assert speed.exchange == 0
    assert isinstance(find_slow([speed, replace(speed, product=1e-9), replace(speed, product=1e-9)], 2), Fault)
