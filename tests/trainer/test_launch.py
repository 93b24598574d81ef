"""What a process derives from its launcher's variables: its port and its share of the cores."""

import os
from typing import Any

import psutil
import pytest
import torch

from pretrain.trainer import launch
from pretrain.trainer.launch import World, find_world, share_of_cores

LAUNCHED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("mine", "others", "threads"),
    [
        (range(8), [], 8),
        (range(8), [range(8)], 4),  # deepspeed, torchrun: every rank may run on every core
        (range(2, 4), [range(2), range(4, 6), range(6, 8)], 2),  # srun has bound each task to its own cores
        (range(8), [range(2)], 7),  # one of them is bound
        (range(3), [range(3), range(3), range(3)], 1),
    ],
)
def test_cores_of_a_machine_are_divided_among_its_ranks(mine: range, others: list[range], threads: int):
    assert share_of_cores(set(mine), [set(mine), *map(set, others)]) == threads


def test_ranks_of_other_machines_take_no_cores(monkeypatch: pytest.MonkeyPatch):
    """Two nodes of two tasks each, which share the eight cores of their node."""

    def all_gather_object(ranks: list[Any], mine: tuple[str, set[int]]) -> None:
        ranks[:] = [("another machine", set(range(8)))] * 2 + [mine, mine]

    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    assert launch._gather_cores(World(2, 4, 0)) == 4


@pytest.mark.parametrize("job", [1, 12_767, 19_999, 123_456_789])
def test_port_of_a_slurm_job_is_below_those_that_the_kernel_assigns(job: int, monkeypatch: pytest.MonkeyPatch):
    task = {"PROCID": "0", "LOCALID": "0", "STEP_NUM_TASKS": "2", "STEP_ID": "0", "STEP_NODELIST": "node[0-1]"}
    environment = {f"SLURM_{name}": value for name, value in {**task, "JOB_ID": str(job)}.items()}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(launch, "_first_host", lambda nodes: "node0")
    find_world()
    assert 20_000 <= int(environment["MASTER_PORT"]) < 32_768


class Launcher:
    """The parent process of a rank, with the methods of `psutil.Process` that are used."""

    def __init__(self, command: str, pid: int = 100):
        self.pid, self._command = pid, command.split()

    def cmdline(self) -> list[str]:
        return self._command

    def create_time(self) -> float:
        return 1234.5


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Any:
    """port(parent, variables) -> MASTER_PORT of a rank."""

    def find(parent: Launcher, **variables: str) -> str:
        for name, value in {**LAUNCHED, "LOCAL_SIZE": "2", **variables}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(psutil, "Process", lambda process: parent)
        find_world()
        return os.environ["MASTER_PORT"]

    return find


def test_two_runs_on_one_machine_get_different_ports(port: Any):
    deepspeed = "python -u -m deepspeed.launcher.launch --master_port=29500 pretrain/run.py"
    first, second = port(Launcher(deepspeed)), port(Launcher(deepspeed, pid=101))
    assert first == port(Launcher(deepspeed), RANK="0", LOCAL_RANK="0"), "the same on all ranks"
    assert first != second
    assert 20000 <= int(first) < 32000


@pytest.mark.parametrize(
    ("parent", "variables"),
    [
        ("python -m deepspeed.launcher.launch", {"MASTER_PORT": "29643"}),  # chosen by the user
        ("python -m deepspeed.launcher.launch", {"WORLD_SIZE": "4"}),  # two nodes: each has its own launcher
        ("bash wrapper.sh", {}),  # a different parent for each rank
    ],
)
def test_port_that_all_ranks_already_share_is_kept(parent: str, variables: dict[str, str], port: Any):
    assert port(Launcher(parent), **variables) == variables.get("MASTER_PORT", "29500")
