"""User errors, tried on the real command: one clear line, exit code 1, nothing lost, nothing hangs."""

import json
import os
import re
import socket
import subprocess
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.index import load_index
from pretrain.config import load
from pretrain.trainer.assemble import build_loader
from pretrain.trainer.engine import ds_settings
from pretrain.trainer.launch import World
from pretrain.trainer.metrics import read_metrics

pytestmark = pytest.mark.engine


def rejection(run: Any) -> str:
    """The output of a run that every rank must have rejected without a traceback."""
    output = "".join(run.outputs())
    assert all(process.returncode == 1 for process in run.all), output
    assert "Traceback" not in output, output
    return output


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("RECIPE mehtod.num_windows=3", "unknown key mehtod: did you mean method?"),
        (
            "RECIPE train.ds_config=FOLDER/engine.json",
            "sets gradient_clipping, which the recipe owns: delete it there and set optim.clip_grad",
        ),
    ],
    ids=["by one process", "when the ranks have started"],
)
def test_invalid_command_is_rejected(
    command: str, message: str, recipe: Path, start: Callable[..., Any], tmp_path: Path
):
    (tmp_path / "engine.json").write_text(json.dumps({"gradient_clipping": 1.0}))
    line = command.replace("RECIPE", str(recipe)).replace("FOLDER", str(tmp_path))
    assert message in rejection(start(*line.split(), processes=1))
    assert not (tmp_path / "runs" / "tiny").exists(), "it never began"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.image_size=225", "225 is not a multiple of model.patch_size=16; the nearest multiples are 224 and 240"),
        ("method.window_size=5", "method.window_size=5 is larger than the image's grid of 4x5 patches"),
        ("method.num_windows=7", "fits in only 6 places on a grid of 4x5: set method.num_windows to at most 6"),
        (
            "train.gradient_accumulation_steps=3",
            "train.global_batch_size=8 is not a multiple of 1 rank x train.gradient_accumulation_steps=3: set "
            "train.global_batch_size to 6 or 9",
        ),
        (
            "train.ds_config=zero9",
            "train.ds_config='zero9' is neither a file nor a name in ds_configs/: did you mean z",
        ),
        ("train.global_batch_size=88", "80 samples"),
        ("data.shards=/nowhere", "/nowhere"),
        ("runs=https://me:secret@host/runs", "runs is a URL: give a folder"),
    ],
)
def test_invalid_configuration_is_rejected(override: str, message: str, recipe: Path):
    """The command reports all errors of the steps before training in the same way as an unknown key."""

    def begin() -> None:
        config = load(str(recipe), [override])
        index = load_index(config.data.shards)
        ds_settings(config, world_size=1)
        build_loader(config, index, World(0, 1, 0))

    with pytest.raises(ValueError, match=re.escape(message)):
        begin()


def test_misspelled_recipe_suggests_the_nearest():
    with pytest.raises(ValueError, match=re.escape("did you mean lomar_vitb16_224_1600e?")):
        load("lomar_vitb16_224_1600", [])


def test_missing_gpu_is_reported(recipe: Path, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "finds no usable GPU: check nvidia-smi" in rejection(start(recipe, processes=1))


def test_port_in_use_by_another_run_is_reported(recipe: Path, start: Callable[..., Any]):
    """The launchers give every run the same port."""
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        output = rejection(start(recipe, processes=1, port=port))
    assert f"port {port} is already in use by process {os.getpid()} (" in output
    assert f"this same run, still running, `kill {os.getpid()}` saves and stops it" in output
    assert "choose another port: deepspeed (or torchrun) --master_port=" in output


def test_exploding_weights_end_the_run_and_the_samples_are_named(
    recipe: Path, start: Callable[..., Any], tmp_path: Path
):
    run = start(recipe, "optim.base_lr=1e30", "train.max_nonfinite_steps=3")
    output = "".join(run.outputs())
    assert all(process.returncode == 1 for process in run.all), output
    assert "3 steps in a row had a non-finite gradient (train.max_nonfinite_steps)" in output
    for rank in (0, 1):
        log = (tmp_path / "runs" / "tiny" / "logs" / f"rank{rank}.log").read_text()
        assert log.count("the gradient is not finite; the weights are unchanged") == 3
        assert f"ERROR pretrain.trainer.main: error on rank {rank}: 3 steps in a row had a non-finite gradient" in log
    named = [json.loads(line) for line in (tmp_path / "runs" / "tiny" / "nonfinite.jsonl").read_text().splitlines()]
    assert len(named) == 3
    assert all(len(set(row["samples"])) == 8 for row in named)


def test_unreadable_images_are_replaced_counted_and_capped(
    recipe: Path, start: Callable[..., Any], tmp_path: Path, shards: Path
):
    folder = tmp_path / "with_bad"
    folder.mkdir()
    for shard in shards.glob("*.tar"):
        (folder / shard.name).write_bytes(shard.read_bytes())
    tiny = BytesIO()
    Image.new("RGB", (1, 1)).save(tiny, "JPEG")
    with tarfile.open(folder / "train-000099.tar", "w") as tar:  # a shard from elsewhere, without our index
        for name, content in {"w\udcf6rds.jpg": b"not an image", "dot.jpg": tiny.getvalue()}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    arguments = (recipe, f"data.shards={folder}", "train.epochs=2", "data.num_workers=2")
    start(*arguments).finish()
    run = tmp_path / "runs" / "tiny"
    assert sum(row["skipped_images"] for row in read_metrics(run / "metrics.jsonl")) >= 2
    listed = (run / "skipped_images.txt").read_text("utf-8")
    assert "w\\xf6rds\tno image\tnot a JPEG" in listed  # a name that is not valid UTF-8
    assert "dot\ttoo small\t1 x 1 is under" in listed
    capped = "".join(start(*arguments, "data.max_skipped_images=0", "name=capped").outputs())
    assert "more than data.max_skipped_images=0" in capped


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk_while_saving_loses_nothing(recipe: Path, start: Callable[..., Any], tmp_path: Path):
    disk = tmp_path / "runs"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("this machine does not let us mount a small disk")
    try:
        keys = (recipe, "checkpoint.every_steps=3", "train.ds_config=zero1")  # a checkpoint takes 1.3 MB
        run = start(*keys)
        output = "".join(run.outputs())
        assert all(process.returncode == 1 for process in run.all), output
        assert "checkpoint step_00000006 could not be written" in output
        assert "training continues and will try the next checkpoint" in output
        assert "mend that and run the same command again: it continues from step 3" in output
        assert sorted(p.name for p in (disk / "tiny" / "checkpoints").iterdir()) == ["latest", "step_00000003"]
        subprocess.run(["mount", "-o", "remount,size=600m", str(disk)], check=True)
        assert "resumes from step_00000003" in start(*keys).finish()
        assert (disk / "tiny" / "checkpoints" / "latest").read_text() == "step_00000010"
    finally:
        subprocess.run(["umount", str(disk)], check=True)
