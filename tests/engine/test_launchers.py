"""The same recipe under each launcher, as a user would start it. tests/slurm covers srun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.processes import ROOT
from helpers.waiting import SECONDS
from safetensors.torch import load_file

pytestmark = pytest.mark.engine
BIN = Path(sys.executable).parent

LAUNCHERS = {
    "deepspeed": ([str(BIN / "deepspeed"), "--num_accelerators", "2"], 2),
    "torchrun": ([str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"], 2),
    "python": ([sys.executable], 1),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_recipe_trains_under_each_launcher(launcher: str, recipe: Path, tmp_path: Path):
    command, world_size = LAUNCHERS[launcher]
    # The lock left by a process that was killed while torch built an extension. Nothing may wait for it.
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm" / "lock").touch()
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    subprocess.run(
        [*command, "pretrain/run.py", str(recipe), "train.global_batch_size=40", "train.gradient_accumulation_steps=4"],
        cwd=ROOT,
        env=environment,
        check=True,
        timeout=SECONDS,
    )
    folder = tmp_path / "runs" / "tiny"
    written = json.loads((folder / "environment.json").read_text())
    assert written["world_size"] == world_size
    assert written["deepspeed"]["gradient_accumulation_steps"] == 4
    assert {p.name for p in folder.iterdir()} == {
        ".lock",
        "checkpoints",
        "config.yaml",
        "encoder.safetensors",
        "environment.json",
        "logs",
        "loss.png",
        "metrics.jsonl",
        "reconstructions.png",
        "tensorboard",
    }
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        assert {"step", "epoch", "loss", "lr", "grad_norm", "images_per_s", "data_wait"} <= json.loads(line).keys()
    encoder = load_file(folder / "encoder.safetensors")
    assert {"patch_embed.proj.weight", "cls_token", "blocks.0.attn.rpe_k.lookup_table_weight", "norm.weight"} <= set(
        encoder
    )
