"""Tests of `downstream/detect/train_detector.py` as users run it with each launcher; tests/slurm covers srun.

They train the shipped config of the smallest encoder from a checkpoint, on ZeRO-3 with all parameters partitioned.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.dense_runs import BIN, ROOT, evaluations, last_checkpoint, launch, write_engines
from helpers.naive_attention import randomized
from helpers.tiny_coco import make_coco
from helpers.waiting import SECONDS
from safetensors.torch import save_file

from pretrain.models.vit import ViT

pytestmark = pytest.mark.engine

OVERRIDES = ["classes=['disc','box']", "train_cfg.max_epochs=1", "train_dataloader.batch_size=1"]


def run(*command: str, overrides: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    entry = str(ROOT / "downstream/detect/train_detector.py")
    return launch(*command, entry, "vitdet_tiny_pennfudan", *OVERRIDES, *overrides, cwd=cwd)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a training in `work`, started with `deepspeed`."""
    folder = tmp_path_factory.mktemp("detect")
    make_coco(folder / "coco", train=4, val=2)
    torch.manual_seed(0)
    facts = {"arch": "vit_tiny", "patch_size": "16", "image_size": "64x64", "position": "relative"}
    save_file(randomized(ViT("vit_tiny", 16, (4, 4), True)).state_dict(), folder / "encoder.safetensors", facts)
    launcher = [str(BIN / "deepspeed"), "--num_accelerators", "2"]
    overrides = ["start.checkpoint=encoder.safetensors", "data_root=coco/", "runs=.", "name=work"]
    done = run(*launcher, overrides=[*overrides, *write_engines(folder)["zero3"]], cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "work.txt").write_text(done.stdout + done.stderr)
    assert "2 ranks x train_dataloader.batch_size=1 x optim_wrapper.accumulative_counts=1 = 2 images" in done.stdout
    return folder


def test_deepspeed_trains(trained: Path):
    assert (trained / "work/last_checkpoint").read_text().endswith("work/epoch_1")
    assert len(list((trained / "work/epoch_1").glob("*_optim_states.pt"))) == 2


def test_log_files_have_details_that_the_console_leaves_out(trained: Path):
    assert "2 images a step" in (trained / "work/logs/rank0.log").read_text()
    console = (trained / "work.txt").read_text()
    for detail in ("System environment:", "Config:", "before_train_iter"):
        assert detail not in console
        assert detail in next((trained / "work").glob("2*/*.log")).read_text()  # mmengine's log


def test_training_starts_from_the_encoder(trained: Path):
    """After two warm-up steps, the weights differ only slightly from the encoder's."""
    weights = last_checkpoint(trained / "work")["state_dict"]
    torch.manual_seed(0)
    encoder = randomized(ViT("vit_tiny", 16, (4, 4), True)).state_dict()
    for name in ("blocks.3.attn.qkv.weight", "blocks.11.attn.rpe_k.lookup_table_weight"):
        torch.testing.assert_close(weights[f"backbone.{name}"], encoder[name], atol=1e-4, rtol=0)
        assert not weights[f"backbone.{name}"].equal(encoder[name]), name


def test_plain_python_evaluates_the_trained_model(trained: Path):
    done = run(sys.executable, overrides=["data_root=coco/", "name=tested", "test=work"], cwd=trained)
    assert done.returncode == 0, done.stdout + done.stderr
    tested = json.loads(done.stdout.splitlines()[-1])
    (row,) = evaluations(trained / "work")
    assert {"coco/bbox_mAP", "coco/segm_mAP"} <= tested.keys()
    for name in tested.keys() - {"time", "data_time"}:
        assert tested[name] == row[name], name


def test_torchrun_ends_when_one_rank_fails(trained: Path):
    """One rank gets a truncated image, which the data check misses because it reads only the header."""
    make_coco(trained / "damaged", train=4)
    path = trained / "damaged/train2017/000000000001.jpg"
    path.write_bytes(path.read_bytes().partition(b"\xff\xda")[0])
    launcher = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    done = run(*launcher, overrides=["data_root=damaged/", "runs=.", "name=failed"], cwd=trained)
    assert done.returncode == 1
    assert "starts" in done.stdout  # the checks have passed
    assert not list((trained / "failed").glob("epoch_*"))


def test_signal_to_all_processes_saves_and_stops(trained: Path):
    """`scancel` signals the data workers, too."""
    entry = str(ROOT / "downstream/detect/train_detector.py")
    overrides = [*OVERRIDES, "train_cfg.max_epochs=1000", "default_hooks.logger.interval=1", "train.precision=fp32"]
    overrides += ["train_dataloader.num_workers=2", "data_root=coco/", "runs=.", "name=cancelled"]
    output = trained / "cancelled.txt"
    with output.open("w") as file:
        command = [sys.executable, "-u", entry, "vitdet_tiny_pennfudan", *overrides]
        process = subprocess.Popen(command, cwd=trained, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.monotonic() + SECONDS
        while "Epoch(train)" not in output.read_text():
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(SECONDS) == 0, output.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert "SIGTERM: saved and stopped after step" in output.read_text()
    assert last_checkpoint(trained / "cancelled")["state_dict"]
