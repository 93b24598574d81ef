"""Warnings and errors when a run resumes on other ranks or in another ZeRO stage. Tested without engines."""

import logging
from pathlib import Path

import pytest

from pretrain.trainer.checkpoint_layout import TrainState
from pretrain.trainer.config import CheckpointConfig
from pretrain.trainer.elastic import layout_change
from pretrain.trainer.launch import World

COMPILED = {"compile": True, "cuda_graphs": True, "residual": "fp32"}
PLAIN = COMPILED | {"compile": False, "cuda_graphs": False}


def check(tmp_path: Path, before: TrainState, now: TrainState) -> None:
    from pretrain.trainer.checkpoint import Checkpoints, check_continues  # imports DeepSpeed

    check_continues(before, now)
    Checkpoints(tmp_path, World(0, 1, 0), CheckpointConfig())._check_numerics(before, now)


def test_numerics_change_caused_by_the_stage_only_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """`model.compile=auto` is off in stage 3."""
    before = TrainState(world_size=2, zero_stage=1, numerics=COMPILED)
    with caplog.at_level(logging.WARNING):
        check(tmp_path, before, TrainState(world_size=3, zero_stage=3, numerics=PLAIN))
    (warning,) = (record.getMessage() for record in caplog.records)
    assert warning == (
        "the run continues with different bits: the number of ranks was 2 and is 3, the ZeRO stage (train.ds_config) "
        "was 1 and is 3, compile was True and is False"
    )


@pytest.mark.parametrize("stage", [1, 3])
def test_other_numerics_changes_stop_the_run(stage: int, tmp_path: Path):
    from pretrain.trainer.checkpoint import CannotContinueError

    before = TrainState(world_size=2, zero_stage=1, numerics=COMPILED)
    now = TrainState(world_size=2, zero_stage=stage, numerics=PLAIN | {"residual": "bf16"})
    with pytest.raises(CannotContinueError) as error:
        check(tmp_path, before, now)
    assert "residual was 'fp32' and is 'bf16'" in str(error.value)
    assert ("compile was True" in str(error.value)) == (stage == 1)


def test_same_ranks_and_stage_are_no_layout_change():
    state = TrainState(world_size=2, zero_stage=3)
    assert layout_change(state, state) == []


def test_key_that_no_longer_exists_only_matters_if_it_was_changed():
    """Fine-tunings once recorded a key that they did not use."""
    from pretrain.trainer.checkpoint import check_continues  # imports DeepSpeed

    now = TrainState(resume_signature={"optim": {"weight_decay": 0.05}})
    old = {"optim": {"weight_decay": 0.05, "decay_class_token": True}}
    check_continues(TrainState(resume_signature=old), now)
    old["optim"]["decay_class_token"] = False
    with pytest.raises(ValueError, match=r"optim\.decay_class_token was False and is 'unset'"):
        check_continues(TrainState(resume_signature=old), now)
