"""The number of data workers of a rank, mostly with `data.num_workers=auto`, and that of a command."""

import os
from pathlib import Path

import pytest

from data import cores, statistics
from data.cores import count_workers


@pytest.fixture(autouse=True)
def node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A node with 96 cores, without a quota and without a launcher; returns the path of the file with the quota."""
    for name in ("SLURM_CPUS_PER_TASK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "cpu.max")
    return tmp_path / "cpu.max"


def test_explicit_number_is_kept() -> None:
    assert [count_workers(wish) for wish in (0, 7)] == [0, 7]


@pytest.mark.parametrize(
    ("variables", "workers"),
    [
        ({}, 32),  # the maximum: one process cannot take batches from more
        ({"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "64"}, 11),
        ({"LOCAL_SIZE": "4", "WORLD_SIZE": "64"}, 23),
        ({"WORLD_SIZE": "8"}, 11),
        ({"SLURM_CPUS_PER_TASK": "12", "WORLD_SIZE": "64"}, 11),
        ({"LOCAL_WORLD_SIZE": "96"}, 1),
        ({"SLURM_CPUS_PER_TASK": "1"}, 1),
        ({"SLURM_CPUS_PER_TASK": "48", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}, 11),  # one task per node
    ],
)
def test_auto_is_the_ranks_share_of_the_node(
    variables: dict[str, str], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert count_workers("auto") == workers


@pytest.mark.parametrize(
    ("quota", "workers"), [("max 100000", 32), ("400000 100000", 3), ("50000 100000", 1), ("", 32)]
)
def test_auto_respects_the_quota_of_a_container(quota: str, workers: int, node: Path) -> None:
    node.write_text(quota)
    assert count_workers("auto") == workers


@pytest.mark.parametrize(("quota", "workers"), [("max 100000", 96), ("400000 100000", 4), ("50000 100000", 1)])
def test_commands_respect_the_quota_of_a_container(
    quota: str, workers: int, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More processes would only wait for each other, and each of them needs memory."""
    given = []

    def measure(shards: str, format: object, images: int | None, workers: int) -> None:
        given.append(workers)
        raise ValueError("enough")

    monkeypatch.setattr(statistics, "measure", measure)
    node.write_text(quota)
    assert statistics.main(["shards"]) == 1
    assert given == [workers]
