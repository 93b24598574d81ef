"""`train.ds_config=auto` keeps the ZeRO stage of the run's checkpoint. A new run gets stage 0."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from pretrain.trainer.checkpoint_layout import MANIFEST, TrainState, checkpoint_name
from pretrain.trainer.config import RunConfig
from pretrain.trainer.engine import choose_ds_config, ds_settings, zero_stage


def configure(folder: Path, **train: str) -> RunConfig:
    return RunConfig(name="my-run", runs=str(folder), data={"shards": "unused"}, train=train)


def write_checkpoint(folder: Path, step: int, stage: int) -> Path:
    checkpoint = folder / "my-run" / "checkpoints" / checkpoint_name(step)
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST).write_text(json.dumps({"state": asdict(TrainState(step=step, zero_stage=stage))}))
    return checkpoint


@pytest.mark.parametrize("ranks", [1, 8])
def test_new_run_uses_stage_0(ranks: int, tmp_path: Path):
    config = configure(tmp_path)
    assert config.train.ds_config == "auto"
    assert zero_stage(ds_settings(config, ranks)) == 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_run_keeps_the_stage_of_its_newest_checkpoint(stage: int, tmp_path: Path):
    write_checkpoint(tmp_path, 900, (stage + 1) % 4)
    write_checkpoint(tmp_path, 1000, stage)
    assert choose_ds_config(configure(tmp_path)) == f"zero{stage}"


def test_checkpoint_without_a_valid_manifest_is_ignored(tmp_path: Path):
    write_checkpoint(tmp_path, 900, 2)
    (write_checkpoint(tmp_path, 1000, 3) / MANIFEST).write_text("{")
    (write_checkpoint(tmp_path, 1100, 3) / MANIFEST).unlink()
    assert choose_ds_config(configure(tmp_path)) == "zero2"
    (tmp_path / "my-run" / "checkpoints" / checkpoint_name(900) / MANIFEST).unlink()
    assert choose_ds_config(configure(tmp_path)) == "zero0"


def test_explicit_engine_overrides_the_checkpoints_stage(tmp_path: Path):
    """The run then resumes in another ZeRO stage than that of its checkpoint."""
    write_checkpoint(tmp_path, 1000, 2)
    assert choose_ds_config(configure(tmp_path, ds_config="zero3_offload")) == "zero3_offload"


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_shipped_engines_overlap_communication_in_small_buckets(name: str, tmp_path: Path):
    """A bucket is sent once it is full, and DeepSpeed's default of 5e8 elements exceeds most encoders."""
    zero = ds_settings(configure(tmp_path, ds_config=name), 2)["zero_optimization"]
    assert zero["overlap_comm"]
    assert zero["contiguous_gradients"], "without it DeepSpeed waits for the device before each bucket"
    assert zero["reduce_bucket_size"] == 25_000_000
    assert zero.get("allgather_bucket_size", 25_000_000) % 2 == 0, "DeepSpeed's alignment"
