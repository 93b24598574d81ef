"""Tests for `python -m pretrain.checkpoints`: listing, verifying, pruning and exporting."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from helpers.checkpoint_stubs import Training

from pretrain import checkpoints
from pretrain.trainer.checkpoint_layout import LATEST
from pretrain.trainer.run_folder import RunFolder


@pytest.fixture(autouse=True)
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def training(tmp_path: Path) -> Training:
    """Checkpoints 10 to 40 of a run that is now configured to keep the last two and multiples of 20."""
    training = Training(tmp_path / "run" / "checkpoints", keep_last=4)
    training.save(10, 20, 30, 40)
    settings = {"name": "run", "checkpoint": {"keep_last": 2, "keep_every_steps": 20}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    return training


def test_lists_checkpoints_and_why_each_is_kept(training: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert checkpoints.main([str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [(line.split()[0], line.partition("; ")[2]) for line in lines[:-1]] == [
        ("step_00000040", "the newest sound one"),
        ("step_00000030", "one of the last 2"),
        ("step_00000020", "a multiple of 20"),
        ("step_00000010", "the next save deletes it"),
    ]
    assert lines[-1] == "4 checkpoints, 0.00 GB in all"


def test_detects_damaged_files_only_with_verify(training: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    training.damage(40)
    assert checkpoints.main([str(tmp_path / "run")]) == 0
    assert "complete; the newest sound one" in capsys.readouterr().out
    assert checkpoints.main([str(tmp_path / "run"), "--verify"]) == 1
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.endswith("damaged: weights.pt differs from what was written")
    assert second.endswith("sound; the newest sound one")


def test_prune_deletes_damaged_and_superseded_checkpoints(
    training: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name in ("unfinished/step_00000050", "damaged_step_00000035", "deleted_step_00000005", "step_00000010.bak"):
        (training.folder / name).mkdir(parents=True)
    training.damage(40)
    with RunFolder(tmp_path / "run").locked():
        assert checkpoints.main([str(tmp_path / "run"), "--prune"]) == 1
    assert "another run is writing to" in capsys.readouterr().err
    assert checkpoints.main([str(tmp_path / "run"), "--prune"]) == 0
    assert "deleted step_00000040, 0.00 GB (damaged)" in capsys.readouterr().out
    assert sorted(path.name for path in training.folder.iterdir()) == [
        LATEST,
        "step_00000010.bak",
        "step_00000020",
        "step_00000030",
    ]
    assert training.start() == 30
    for step in (20, 30):
        training.damage(step)
    assert checkpoints.main([str(tmp_path / "run"), "--prune"]) == 1
    assert "has no sound checkpoint: nothing was deleted" in capsys.readouterr().err
    assert training.steps == [20, 30]


def test_export_runs_the_export_module(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run, out = str(tmp_path / "run"), str(tmp_path / "out.safetensors")
    commands: list[list[str]] = []

    def run_command(command: list[str]) -> subprocess.CompletedProcess[bytes]:
        commands.append(command[1:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run_command)
    for step, name in (("20", "step_00000020"), ("step_00000030", "step_00000030"), ("latest", "step_00000040")):
        assert checkpoints.main([run, "--export", step, out]) == 0
        checkpoint = str(training.folder / name)
        assert commands.pop() == ["-m", "downstream.checkpoints.export", checkpoint, out, "--format", "timm"]
    for step in (20, 40):
        training.damage(step)
    (training.folder / "step_00000050").mkdir()
    assert checkpoints.main([run, "--export", "latest", out]) == 0
    assert commands.pop()[2] == str(training.folder / "step_00000030")
    assert checkpoints.main([run, "--export", "20", out]) == 1
    assert checkpoints.main([run, "--export", "25", out]) == 1
    stderr = capsys.readouterr().err
    assert "step_00000050 is damaged and skipped: manifest.json is missing" in stderr
    assert "step_00000040 is damaged and skipped: weights.pt differs" in stderr
    assert "step_00000020 is damaged: weights.pt differs from what was written; `--export latest` takes" in stderr
    assert "--export 25: no such checkpoint; steps in " in stderr
    assert "/checkpoints: 50, 40, 30, 20, 10" in stderr
    for step in (10, 30):
        training.damage(step)
    assert checkpoints.main([run, "--export", "latest", out]) == 1
    assert "has no sound checkpoint: nothing was exported" in capsys.readouterr().err
    assert checkpoints.main([str(tmp_path / "nothing")]) == 1
