"""The order of samples when shards are shuffled in groups."""

import numpy as np
import pytest

from data.order import GroupedOrder, Groups, group_steps, rank_views, steps_per_epoch

SIZES = np.array([7, 8, 7, 8, 7, 8, 5])
TOTAL, BATCH = int(SIZES.sum()), 6
SHARD = np.repeat(np.arange(len(SIZES)), SIZES)  # the shard of each sample


def shown(size: int, steps: range, world: int = 1, accumulation: int = 1, repeats: int = 1) -> list[tuple[int, int]]:
    """(epoch, sample) of all ranks, in the order of the global batch."""
    ranks = [
        list(rank_views(TOTAL, 3, steps, BATCH, accumulation, rank, world, repeats, Groups(SIZES, size)))
        for rank in range(world)
    ]
    parts = [ranks[rank][n] for n in range(len(ranks[0])) for rank in range(world)]
    return [pair for views in parts for pair in zip(views.epochs.tolist(), views.samples.tolist(), strict=True)]


def test_order_is_the_same_in_every_release() -> None:
    """A changed order would silently break resuming old runs."""
    order = GroupedOrder(Groups(SIZES, 3), 3, 1)
    assert [shards.tolist() for shards in order.groups] == [[4, 0, 6], [5, 1], [3, 2]]
    assert order.samples(0, 12).tolist() == [3, 49, 5, 35, 30, 6, 2, 33, 36, 48, 46, 0]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_each_sample_comes_once_and_groups_are_contiguous(size: int) -> None:
    order = GroupedOrder(Groups(SIZES, size), 3, 0)
    samples = order.samples(0, TOTAL)
    assert sorted(samples.tolist()) == list(range(TOTAL))
    assert max(map(len, order.groups)) <= size
    assert max(map(len, order.groups)) - min(map(len, order.groups)) <= 1
    start = 0
    for shards, end in zip(order.groups, order.ends.tolist(), strict=True):
        assert set(SHARD[samples[start:end]].tolist()) == set(shards.tolist())
        start = end
    pieces = [order.samples(a, min(a + 5, TOTAL)) for a in range(0, TOTAL, 5)]
    assert np.concatenate(pieces).tolist() == samples.tolist()


def test_epochs_and_seeds_differ() -> None:
    keys = [(seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    orders = {tuple(GroupedOrder(Groups(SIZES, 3), *key).samples(0, TOTAL)) for key in keys}
    assert len(orders) == 4


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("size", [1, 3])
def test_order_does_not_depend_on_ranks_or_accumulation(size: int, repeats: int) -> None:
    steps = range(4, 20)
    whole = shown(size, steps, repeats=repeats)
    for world, accumulation in ((2, 1), (3, 1), (1, 2), (3, 2), (6, 1)):
        assert shown(size, steps, world, accumulation, repeats) == whole


@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_plan_has_exactly_the_groups_of_each_step(size: int, repeats: int) -> None:
    per_pass = steps_per_epoch(TOTAL, BATCH) * repeats
    steps = range(3, 2 * per_pass + 2)
    plan = list(group_steps(Groups(SIZES, size), 3, steps, BATCH, repeats))
    assert [group.first_step for group in plan] == sorted(group.first_step for group in plan)
    for step in steps:
        needed = {int(SHARD[sample]) for _, sample in shown(size, range(step, step + 1), repeats=repeats)}
        planned = [set(group.shards) for group in plan if group.first_step <= step <= group.last_step]
        assert needed <= set().union(*planned)
        assert all(needed & group for group in planned), "nothing is fetched that no step shows"


def test_without_a_size_all_shards_are_one_group() -> None:
    assert [tuple(group) for group in group_steps(Groups(SIZES, 0), 3, range(5, 9), BATCH)] == [(5, 8, range(7))]
