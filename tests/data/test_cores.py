"""Data workers of a rank that is told to take what there is."""

import os
from pathlib import Path

import pytest

from data import cores
from data.cores import count_workers


@pytest.fixture(autouse=True)
def node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """96 cores without a quota and without a launcher; the file that says the quota."""
    for name in ("SLURM_CPUS_PER_TASK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "cpu.max")
    return tmp_path / "cpu.max"


def test_a_number_is_a_number() -> None:
    assert [count_workers(wish) for wish in (0, 7)] == [0, 7]


@pytest.mark.parametrize(
    ("variables", "workers"),
    [
        ({}, 32),  # no more than one process can take batches from
        ({"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "64"}, 11),
        ({"LOCAL_SIZE": "4", "WORLD_SIZE": "64"}, 23),
        ({"WORLD_SIZE": "8"}, 11),
        ({"SLURM_CPUS_PER_TASK": "12", "WORLD_SIZE": "64"}, 11),
        ({"LOCAL_WORLD_SIZE": "96"}, 1),
        ({"SLURM_CPUS_PER_TASK": "1"}, 1),
        ({"SLURM_CPUS_PER_TASK": "48", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}, 11),  # one task a node
    ],
)
def test_auto_is_a_share_of_the_node(variables: dict[str, str], workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert count_workers("auto") == workers


@pytest.mark.parametrize(
    ("quota", "workers"), [("max 100000", 32), ("400000 100000", 3), ("50000 100000", 1), ("", 32)]
)
def test_auto_knows_a_containers_limit(quota: str, workers: int, node: Path) -> None:
    node.write_text(quota)
    assert count_workers("auto") == workers
