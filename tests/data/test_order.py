import numpy as np
import pytest

from data.order import EpochOrder, Stream, check_divisible, micro_batches, sample_rng, steps_per_epoch


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return EpochOrder(num_samples, seed, epoch).samples(0, num_samples)


def test_epoch_is_a_complete_permutation() -> None:
    order = epoch_order(1000, seed=3, epoch=7)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(1000))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    same = epoch_order(1000, seed=3, epoch=7)
    assert np.array_equal(same, epoch_order(1000, seed=3, epoch=7))
    assert not np.array_equal(same, epoch_order(1000, seed=3, epoch=8))
    assert not np.array_equal(same, epoch_order(1000, seed=4, epoch=7))


def test_order_is_the_same_in_every_release() -> None:
    """A changed order would silently break resuming old runs."""
    assert epoch_order(8, seed=0, epoch=0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]


def test_shuffle_is_uniform() -> None:
    """Every sample is equally likely at every position: 4000 epochs of 6 samples, 36 cells of mean 667, sd 24."""
    counts = np.zeros((6, 6))
    for epoch in range(4000):
        counts[np.arange(6), epoch_order(6, seed=1, epoch=epoch)] += 1
    assert abs(counts - 4000 / 6).max() < 5 * 24


@pytest.mark.parametrize("part", [100, 999, 1500, 2999, 3000])
def test_order_does_not_depend_on_the_part_size(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on the chunk size: it is always a stable sort of all words, as in every release."""
    monkeypatch.setattr("data.order._CHUNK", 700)
    words = np.random.PCG64(np.random.SeedSequence([3, 7])).random_raw(3000)
    expected = np.argsort(words, kind="stable")
    order = EpochOrder(3000, seed=3, epoch=7, part=part)
    for start, stop in ((0, 3000), (0, 1), (2999, 3000), (700, 2200), (10, 20)):
        assert np.array_equal(order.samples(start, stop), expected[start:stop])


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_partition_the_batch(world: int, accumulation: int) -> None:
    batch = epoch_order(24, seed=0, epoch=0)
    parts = [micro_batches(batch, accumulation, rank, world) for rank in range(world)]
    assert all(part.shape == (accumulation, 24 // world // accumulation) for part in parts)
    in_sequence = np.stack(parts, axis=1).reshape(-1)  # micro-batch by micro-batch, rank by rank
    assert np.array_equal(in_sequence, batch)


def test_last_incomplete_batch_is_dropped() -> None:
    assert steps_per_epoch(48, 24) == 2
    assert steps_per_epoch(71, 24) == 2


def test_fewer_samples_than_a_batch_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"23 samples are fewer .* 24: lower train.global_batch_size to at most 23"):
        steps_per_epoch(23, 24)


def test_indivisible_batch_error_names_the_nearest_sizes() -> None:
    check_divisible(24, 4, 2)
    factors, nearest = r"4 ranks x train\.gradient_accumulation_steps=2", r"set train\.global_batch_size to 16 or 24"
    with pytest.raises(ValueError, match=rf"train\.global_batch_size=20 .* {factors}: {nearest}"):
        check_divisible(20, 4, 2)
    with pytest.raises(ValueError, match=r"set train\.global_batch_size to 8$"):
        check_divisible(5, 4, 2)


def test_streams_of_a_sample_are_independent() -> None:
    def draws(*key: int, stream: Stream) -> list[float]:
        return sample_rng(*key, stream).random(4).tolist()

    crop = draws(0, 1, 2, stream=Stream.CROP)
    assert crop == draws(0, 1, 2, stream=Stream.CROP)
    others = [draws(0, 1, 2, stream=Stream.MASK), draws(1, 1, 2, stream=Stream.CROP)]
    others += [draws(0, 2, 2, stream=Stream.CROP), draws(0, 1, 3, stream=Stream.CROP)]
    assert all(not set(crop) & set(other) for other in others)
