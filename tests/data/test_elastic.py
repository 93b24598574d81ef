"""A run resumes with the same views, whatever its ranks, workers, micro-batches, shards and repeats."""

import pickle
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.shard_tools import flip, jpeg, write_tar

from data.batch import Batch
from data.index import Index, build_index, load_index
from data.loader import Loader
from data.order import EpochOrder, Views, rank_views, steps_per_epoch
from data.transforms import Augmentation
from data.workers import in_workers
from pretrain.trainer.checkpoint import CannotContinueError, check_continues
from pretrain.trainer.checkpoint_layout import TrainState
from pretrain.trainer.prefetch import prefetch
from pretrain.trainer.shard_record import record_shards, shard_difference

BATCH = 48  # divisible by ranks x micro-batches in all tests below
SAMPLES = 311  # six steps per epoch, and 23 samples left over
STEPS = 15  # more than two epochs; with two repeats, more than one pass


Pairs = list[tuple[int, int]]  # (epoch, sample) of each view


def pairs(views: Views) -> Pairs:
    return list(zip(views.epochs.tolist(), views.samples.tolist(), strict=True))


def steps_of_all_ranks(start: int, end: int, world: int, accumulation: int, repeats: int) -> list[Pairs]:
    """Returns, for each step, the views of all ranks in the order of the global batch."""
    ranks = [
        list(rank_views(SAMPLES, 3, range(start, end), BATCH, accumulation, rank, world, repeats))
        for rank in range(world)
    ]
    in_turn = [list(chain(*map(pairs, micro_batch))) for micro_batch in zip(*ranks, strict=True)]
    assert len(in_turn) == (end - start) * accumulation
    return [list(chain(*in_turn[i : i + accumulation])) for i in range(0, len(in_turn), accumulation)]


@pytest.mark.parametrize("repeats", [1, 2, 3, 5])
def test_views_do_not_depend_on_the_layout_or_where_a_run_stopped(repeats: int) -> None:
    """Compares runs that resume at any step, in any layout, with an uninterrupted run."""
    expected = steps_of_all_ranks(0, STEPS, 1, 1, repeats)
    assert all(len(step) == BATCH for step in expected)
    layouts = [(world, accumulation) for world in (1, 2, 3, 4, 8) for accumulation in (1, 2)]
    for world, accumulation in layouts:
        for stop in range(STEPS):
            assert steps_of_all_ranks(stop, STEPS, world, accumulation, repeats) == expected[stop:]
    changing = [steps_of_all_ranks(step, step + 1, *layouts[step % 10], repeats)[0] for step in range(STEPS)]
    assert changing == expected


@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_pass_shows_the_views_of_as_many_epochs_as_repeats(repeats: int) -> None:
    """No view is lost or shown twice; each has the same draws as without repeats, in another order."""
    steps = steps_per_epoch(SAMPLES, BATCH) * repeats
    for number in range(2):
        shown = list(chain(*steps_of_all_ranks(number * steps, (number + 1) * steps, 1, 1, repeats)))
        epochs = range(number * repeats, (number + 1) * repeats)
        samples = EpochOrder(SAMPLES, 3, epochs[0]).samples(0, steps // repeats * BATCH).tolist()
        assert shown == [(epoch, sample) for sample in samples for epoch in epochs]


def test_one_repeat_gives_the_order_from_before_repeats_existed() -> None:
    order = np.argsort(np.random.PCG64(np.random.SeedSequence([3, 1])).random_raw(SAMPLES), kind="stable")
    first = next(rank_views(SAMPLES, 3, range(8, 9), BATCH, accumulation=2, rank=1, world_size=3))
    assert pairs(first) == [(1, sample) for sample in order[2 * BATCH :][:BATCH].reshape(2, 3, -1)[0, 1]]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("repeats", [1, 2])
def test_prefetched_views_that_were_not_trained_on_are_not_lost(workers: int, repeats: int) -> None:
    """Stops after several steps, each time with workers that are already ahead."""
    trained: list[Pairs] = []
    for stop in (1, 4, 5, 9):
        requested: list[Views] = []
        requests = rank_views(SAMPLES, 3, range(len(trained), 40), BATCH, repeats=repeats)
        made = in_workers(pairs, (requested.append(views) or views for views in requests), workers)
        wanted = stop - len(trained)
        trained += [next(made) for _ in range(wanted)]
        made.close()
        assert len(requested) > wanted
    assert trained == steps_of_all_ranks(0, 9, 1, 1, repeats)


def show(index: Index, start: int, end: int, world: int = 1, **settings: object) -> list[Batch]:
    """Returns each step of all ranks as one batch."""
    ranks = [
        list(
            Loader(index, size=(16, 16), batch=24, seed=5, rank=rank, world_size=world, **settings).batches(start, end)
        )  # type: ignore[arg-type]
        for rank in range(world)
    ]
    steps = []
    for step in range(end - start):
        parts = list(chain(*zip(*(rank[step] for rank in ranks), strict=True)))
        steps.append(
            Batch(
                torch.cat([part.images for part in parts]),
                {},
                None,
                torch.cat([part.samples for part in parts]),
                tuple(chain(*(part.keys for part in parts))),
                tuple(sorted(chain(*(part.skipped for part in parts)))),
            )
        )
    return steps


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a.keys, a.skipped) == (b.keys, b.skipped)
        assert torch.equal(a.images, b.images)


@pytest.mark.parametrize("views", [1, 2])
def test_repeats_have_the_crops_of_later_epochs(index: Index, views: int) -> None:
    """Two epochs have exactly the same crops with and without repeats, also with two views per sample, as in LUT."""
    augmentations = [Augmentation(color_jitter=0.5), Augmentation(three_augment=True)][:views]
    images: dict[int, dict[tuple[int, int], torch.Tensor]] = {1: {}, 2: {}}
    for repeats in images:
        steps = Loader(index, size=(16, 16), batch=53, seed=5, augmentations=augmentations, repeats=repeats)
        for (batch,) in steps.batches(0, 2):
            for sample, image in zip(batch.samples.tolist(), batch.images, strict=True):
                images[repeats][sample, (sample, 0) in images[repeats]] = image
    assert images[1].keys() == images[2].keys() == {(sample, again) for sample in range(53) for again in range(2)}
    assert all(torch.equal(image, images[2][which]) for which, image in images[1].items())
    assert not any(torch.equal(images[1][sample, 0], images[1][sample, 1]) for sample in range(53))


@pytest.mark.parametrize(("world", "workers", "accumulation"), [(1, 3, 1), (2, 1, 1), (3, 0, 2), (4, 0, 3), (8, 0, 1)])
def test_pixels_with_repeats_do_not_depend_on_ranks_and_workers(
    index: Index, world: int, workers: int, accumulation: int
) -> None:
    """Also if the views of one photograph are split between two ranks, since 24 / 8 is odd."""
    ours = show(index, 1, 5, world, num_workers=workers, accumulation=accumulation, repeats=2)
    assert_same(ours, show(index, 0, 5, repeats=2)[1:])


def test_photograph_is_read_once_for_all_its_repeats(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr("data.reader.ShardReader.read", lambda self, sample: read.append(sample) or jpeg(sample))
    (batch,) = next(Loader(index, size=(8, 8), batch=24, seed=5, repeats=4).batches(0, 1))
    assert batch.samples[::4].tolist() == read
    assert len(batch.samples) == 24


def test_each_repeat_of_a_bad_image_is_replaced_and_reported(tmp_path: Path) -> None:
    members = [(f"img{sample:02d}.jpg", b"bad" if sample == 4 else jpeg(sample)) for sample in range(24)]
    write_tar(tmp_path / "bad.tar", members)
    index = load_index(tmp_path)
    one, two = (show(index, 0, 2, world, repeats=2) for world in (1, 8))
    assert_same(two, one)
    assert [key for step in one for key in step.keys].count("img05") == 4
    assert sum(len(step.skipped) for step in one) == 2


def test_samples_do_not_depend_on_the_division_into_shards(tmp_path: Path) -> None:
    """53 images in one shard, and in four and five shards of different sizes."""
    batches = []
    for name, ends in {"one": (53,), "four": (3, 10, 30, 53), "five": (1, 5, 17, 33, 53)}.items():
        (tmp_path / name).mkdir()
        for number, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
            members = [(f"img{sample:02d}.jpg", jpeg(sample)) for sample in range(start, end)]
            write_tar(tmp_path / name / f"{number}.tar", members)
        batches.append(show(load_index(tmp_path / name), 0, 3, repeats=2))
    assert_same(batches[1], batches[0])
    assert_same(batches[2], batches[0])


def test_step_prefetched_to_the_device_is_not_lost(index: Index) -> None:
    ahead = prefetch(Loader(index, size=(8, 8), batch=24, seed=5, num_workers=2).batches(0, 6), torch.device("cpu"))
    trained = [next(ahead)[0].keys, next(ahead)[0].keys]
    ahead.close()
    trained += [batch.keys for (batch,) in Loader(index, size=(8, 8), batch=24, seed=5).batches(2, 6)]
    assert trained == [batch.keys for batch in show(index, 0, 6)]


def state_of(index: Index) -> TrainState:
    return TrainState(fingerprint=index.fingerprint, shards=record_shards(index))


def test_resuming_with_changed_shards_is_rejected_by_name(shards: Path, index: Index) -> None:
    before = state_of(index)
    check_continues(before, state_of(load_index(shards)))
    added = shards / "train-000003.tar"
    write_tar(added, [("new.jpg", jpeg(1))])
    with pytest.raises(ValueError, match=r"train-000003.tar: the shard is not in the index .* --reindex"):
        load_index(shards)

    def resume_error() -> str:
        (shards / "index.npz").unlink()
        with pytest.raises(CannotContinueError) as caught:
            check_continues(before, state_of(load_index(shards)))
        return str(caught.value)

    assert (
        "data.shards has different samples: 1 of 4 shards are new: 'train-000003.tar'; data.accept_changed_shards=true"
        in resume_error()
    )
    added.unlink()
    write_tar(shards / "train-000001.tar", [("other.jpg", jpeg(1))])
    assert "1 shards were rewritten: 'train-000001.tar' (the first had 16 samples in " in resume_error()
    (shards / "train-000001.tar").unlink()
    assert "1 of 3 shards are gone: 'train-000001.tar'; data.accept" in resume_error()
    labels = [(f"img{sample}.cls", b"7") for sample in range(30, 46)]  # as many bytes as before
    images = [(f"img{sample}.jpg", jpeg(sample, 40 + sample, 90 - sample)) for sample in range(30, 46)]
    write_tar(shards / "train-000001.tar", list(chain(*zip(images, labels, strict=True))))
    assert "shards with the same names and sizes contain different images or labels" in resume_error()
    assert shard_difference({}, before.shards) == "the fingerprint of the index differs"


def test_changed_images_of_the_same_size_are_rejected_by_name(shards: Path, index: Index) -> None:
    """If both indexes have checksums; an index from tar headers alone cannot detect changed images."""
    checked = build_index(shards, checksums=True)
    before = state_of(checked)
    flip(shards / "train-000001.tar", int(index.offset[30]) + 300)
    (shards / "index.npz").unlink()
    check_continues(before, state_of(load_index(shards)))
    after = state_of(build_index(shards, checksums=True))
    check_continues(state_of(index), after)
    with pytest.raises(CannotContinueError, match=r"different images or labels: 'train-000001.tar'; "):
        check_continues(before, after)


def test_index_of_a_million_images_is_memory_mapped(shards: Path, index: Index, tmp_path: Path) -> None:
    """It loads quickly, is not copied into memory, and is sent to a worker as a path."""
    count = 1_300_000
    offset = np.arange(count) * 1024 + 512
    stored = dict(np.load(shards / "index.npz"))
    stored |= {"shard_sizes": np.array([count - 2, 1, 1]), "offset": offset, "length": np.full(count, 100_000)}
    stored |= {"label": np.arange(count, dtype=np.int32), "key_text": np.tile(np.frombuffer(b"key", np.uint8), count)}
    stored |= {"key_ends": np.arange(3, 3 * count + 1, 3)}
    np.savez(shards / "index.npz", **stored)
    start = time.perf_counter()
    loaded = load_index(shards)
    assert time.perf_counter() - start < 2
    assert len(loaded) == count
    assert np.array_equal(loaded.offset, offset)
    assert (loaded.keys[count - 1], loaded.shard_of(count - 3), loaded.shard_of(count - 1)) == ("key", 0, 2)
    for array in (loaded.offset, loaded.length, loaded.label, loaded.keys.text, loaded.keys.ends):
        assert not array.flags.owndata
        assert not array.flags.writeable
    sent = pickle.dumps(Loader(loaded, size=(8, 8), batch=8, seed=0, labels=True)._decoder)
    assert len(sent) < 2000
    index_again = pickle.loads(sent)._index
    assert np.array_equal(index_again.label, loaded.label)
    stored["fingerprint"] = np.array("other")
    np.savez(tmp_path / "new.npz", **stored)
    (tmp_path / "new.npz").replace(shards / "index.npz")
    assert int(loaded.label[5]) == 5, "the file that was mapped is still there"
    with pytest.raises(ValueError, match=r"index.npz: the index was rebuilt while in use"):
        pickle.loads(sent)
