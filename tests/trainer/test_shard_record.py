"""Changed shards are accepted at the end of a pass, and the run continues as one that had them from the start."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from data.order import rank_views
from pretrain.trainer.checkpoint_layout import TrainState
from pretrain.trainer.shard_record import ChangedShards, describe_change

OLD = {"a.tar": [1000, 30], "b.tar": [1000, 30]}
NEW = OLD | {"c.tar": [900, 20]}
NOW = TrainState(fingerprint="new", shards=NEW, index_samples=80)


def state_at(step: int, **keys: object) -> TrainState:
    return replace(TrainState(step=step, fingerprint="old", shards=OLD, index_samples=60), **keys)


def test_order_continues_with_the_next_epoch_of_the_new_shards() -> None:
    accepted = ChangedShards(batch=8).accept(state_at(14, updates=13, samples=112), NOW)  # 7 steps an epoch, then 10
    assert (accepted.step, accepted.updates, accepted.samples) == (14, 13, 112)
    assert accepted.step + accepted.offset == 20
    assert (accepted.fingerprint, accepted.index_samples, accepted.shards) == ("new", 80, NEW)
    views = rank_views(80, 0, range(accepted.step + accepted.offset, 30), 8)
    shown = [(epoch, sample) for view in views for epoch, sample in zip(*map(np.ndarray.tolist, view), strict=True)]
    assert {epoch for epoch, _ in shown} == {2}
    assert sorted(sample for _, sample in shown) == list(range(80))


def test_second_change_is_counted_from_the_first() -> None:
    rule = ChangedShards(batch=8)
    once = rule.accept(state_at(14), NOW)
    fewer = TrainState(fingerprint="fewer", shards={"c.tar": [900, 20]}, index_samples=20)
    twice = rule.accept(replace(once, step=24), fewer)  # epoch 3: another 10 steps
    assert twice.step + twice.offset == 3 * (20 // 8)
    assert [change["epoch"] for change in twice.shard_changes] == [2, 3]
    assert TrainState(**asdict(twice)) == twice
    assert describe_change(twice.shard_changes[0]) == (
        "since step 14, the end of epoch 2, on other shards: 1 of 3 shards are new: 'c.tar'; 60 samples in 7 steps "
        "per epoch before, 80 in 10 since"
    )
    with pytest.raises(ValueError, match="step 23, lies within the one from step 14 to step 24"):
        rule.accept(replace(once, step=23), fewer)


def test_change_within_an_epoch_is_rejected_with_alternatives() -> None:
    rule = ChangedShards(batch=8)
    with pytest.raises(
        ValueError, match=r"the one from step 7 to step 14: train up to step 14 .*every_steps=7 saves there\)$"
    ):
        rule.accept(state_at(10), NOW, ["step_00000010", "step_00000005"])
    with pytest.raises(ValueError, match=r"or move 'step_00000010' away to continue from 'step_00000007'$"):
        rule.accept(state_at(10), NOW, ["step_00000010", "step_00000007"])


def test_with_repeats_a_change_is_accepted_only_after_a_whole_pass() -> None:
    rule = ChangedShards(batch=8, repeats=2)
    with pytest.raises(
        ValueError, match="at the end of a pass of 2 epochs, but the newest checkpoint, step 7, lies within the one"
    ):
        rule.accept(state_at(7), NOW)
    assert rule.accept(state_at(14), NOW).offset == 20 - 14


def test_older_checkpoints_use_the_sample_counts_of_their_shards() -> None:
    assert ChangedShards(batch=8).accept(state_at(7, index_samples=0), NOW).offset == 10 - 7
    with pytest.raises(ValueError, match="does not record how many samples"):
        ChangedShards(batch=8).accept(state_at(7, index_samples=0, shards={}), NOW)
