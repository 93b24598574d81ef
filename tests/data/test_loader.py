import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.shard_tools import encode, jpeg, smooth_image, write_tar
from helpers.waiting import SECONDS
from PIL import Image

from data.batch import Batch, SizedUntil
from data.index import Index, load_index
from data.loader import Loader
from data.transforms import Augmentation

SIZE = (16, 24)
BATCH = 24  # of 53 samples: two steps per epoch; divisible by ranks x accumulation below


def sample_masks(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"masked": rng.random((4, 6)) < 0.5, "windows": rng.integers(0, 100, 3)}


def loader(index: Index, **settings: object) -> Loader:
    return Loader(index, **{"size": SIZE, "batch": BATCH, "seed": 5, "mask_sampler": sample_masks} | settings)  # type: ignore[arg-type]


def stream(index: Index, start: int, end: int, world: int = 1, **settings: object) -> list[list[Batch]]:
    """Returns, for each step, the micro-batches of all ranks in the order of the global batch."""
    ranks = [list(loader(index, rank=rank, world_size=world, **settings).batches(start, end)) for rank in range(world)]
    assert all(len(steps) == end - start for steps in ranks)
    return [list(chain(*zip(*(steps[step] for steps in ranks), strict=True))) for step in range(end - start)]


def assert_same(ours: list[list[Batch]], theirs: list[list[Batch]]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert [key for batch in a for key in batch.keys] == [key for batch in b for key in batch.keys]
        assert sorted(chain(*(batch.skipped for batch in a))) == sorted(chain(*(batch.skipped for batch in b)))
        assert torch.equal(torch.cat([batch.samples for batch in a]), torch.cat([batch.samples for batch in b]))
        assert torch.equal(torch.cat([batch.images for batch in a]), torch.cat([batch.images for batch in b]))
        for name in ("masked", "windows"):
            assert torch.equal(
                torch.cat([x.mask_indices[name] for x in a]), torch.cat([x.mask_indices[name] for x in b])
            )


def test_shapes_types_and_keys_of_a_batch(index: Index) -> None:
    (step,) = loader(index, accumulation=2, world_size=3, rank=1).batches(0, 1)
    assert len(step) == 2
    for batch in step:
        assert batch.images.shape == (4, *SIZE, 3)
        assert batch.images.dtype == torch.uint8
        assert batch.samples.dtype == torch.int64
        assert batch.keys == tuple(index.keys[sample] for sample in batch.samples.tolist())
        assert batch.mask_indices["masked"].shape == (4, 4, 6)
        assert batch.mask_indices["masked"].dtype == torch.bool
        assert batch.skipped == ()


def test_epoch_has_every_sample_once(index: Index) -> None:
    for epoch in range(2):
        steps = stream(index, 53 * epoch, 53 * (epoch + 1), batch=1)
        assert sorted(int(step[0].samples[0]) for step in steps) == list(range(53))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_do_not_depend_on_ranks_workers_or_accumulation(
    index: Index, workers: int, world: int, accumulation: int
) -> None:
    """Pixels, masks and keys of three steps across an epoch boundary."""
    assert_same(stream(index, 0, 3, world, num_workers=workers, accumulation=accumulation), stream(index, 0, 3))


def test_crops_depend_on_seed_and_epoch(index: Index) -> None:
    (first,), (other,) = stream(index, 0, 1, batch=53), stream(index, 0, 1, batch=53, seed=6)
    (next_epoch,) = stream(index, 1, 2, batch=53)
    for batches in (other, next_epoch):
        ours, theirs = first[0].samples.argsort(), batches[0].samples.argsort()
        same = (first[0].images[ours] == batches[0].images[theirs]).flatten(1).all(1)
        assert same.sum() < 3
        assert not torch.equal(first[0].mask_indices["masked"][ours], batches[0].mask_indices["masked"][theirs])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resume", [1, 2, 3, 5])
def test_resumed_equals_uninterrupted(index: Index, resume: int, workers: int) -> None:
    """Resumed mid-epoch or between epochs, on two ranks instead of one, the rest of the stream is the same."""
    assert_same(stream(index, resume, 6, world=2, num_workers=workers), stream(index, 0, 6)[resume:])


def sample_fewer_masks(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"masked": rng.random((2, 3)) < 0.5, "windows": rng.integers(0, 100, 2)}


SMALLER = (12, 8)
EARLIER = (SizedUntil(2, SMALLER, sample_fewer_masks), SizedUntil(4, (8, 8), None), SizedUntil(6, SIZE, sample_masks))


@pytest.mark.parametrize("repeats", [1, 2])
def test_earlier_sizes_give_the_batches_of_a_run_at_that_size(index: Index, repeats: int) -> None:
    """Each epoch has the same order, crops and masks as in a run that uses its size throughout."""
    sized = stream(index, 0, 14, earlier=EARLIER, repeats=repeats)
    settings = {"size": SMALLER, "mask_sampler": sample_fewer_masks}, {"size": (8, 8), "mask_sampler": None}, {}
    alone = [stream(index, 0, 14, repeats=repeats, **keys) for keys in settings]
    for step, batches in enumerate(sized):
        expected = alone[min(step // 4, 2)][step]
        assert [batch.keys for batch in batches] == [batch.keys for batch in expected]
        assert all(torch.equal(a.images, b.images) for a, b in zip(batches, expected, strict=True))
        for name, drawn in expected[0].mask_indices.items():
            assert torch.equal(batches[0].mask_indices[name], drawn)
        assert batches[0].mask_indices.keys() == expected[0].mask_indices.keys()
    assert [*map(loader(index, earlier=EARLIER).size_at, (0, 3, 4, 7, 8, 99))] == [
        *[SMALLER] * 2,
        *[(8, 8)] * 2,
        *[SIZE] * 2,
    ]


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize(("world", "accumulation", "workers"), [(1, 1, 2), (3, 2, 0), (2, 2, 1)])
def test_resumed_equals_uninterrupted_across_a_change_of_size(
    index: Index, world: int, accumulation: int, workers: int, repeats: int
) -> None:
    """With other ranks, micro-batches and workers, which prefetch batches of two sizes."""
    earlier = EARLIER[:1]
    whole = stream(index, 0, 7, earlier=earlier, repeats=repeats)
    for resume in range(2, 6) if workers == 0 else (3,):
        settings: dict[str, object] = {"accumulation": accumulation, "num_workers": workers, "repeats": repeats}
        assert_same(stream(index, resume, 7, world, earlier=earlier, **settings), whole[resume:])
    assert [step[0].images.shape[1:3] for step in whole] == [*[SMALLER] * 4, *[SIZE] * 3]


def test_steps_per_epoch_drop_the_incomplete_batch(index: Index) -> None:
    assert loader(index).steps_per_epoch == 2


def test_flip_and_crop_scale(index: Index) -> None:
    """Whole images, never or always flipped, are compared with the files themselves."""
    plain, flipped = (
        next(loader(index, augmentations=[Augmentation(scale=(1.0, 1.0), flip=flip)], size=(50, 50)).batches(0, 1))[0]
        for flip in (0.0, 1.0)
    )
    assert torch.equal(plain.images.flip(2), flipped.images)
    close = 0
    for image, sample in zip(plain.images.numpy().astype(int), plain.samples.tolist(), strict=True):
        file = Image.open(io.BytesIO(jpeg(sample, 40 + sample, 90 - sample)))
        whole = np.asarray(file.resize((50, 50), Image.Resampling.BICUBIC)).astype(int)
        close += int(abs(image - whole).max() <= 1)
    assert close >= 5  # images whose aspect ratio is allowed for a crop


def test_second_view_differs_and_leaves_the_first_unchanged(index: Index) -> None:
    first = Augmentation(crop="simple")
    second = Augmentation(crop="simple", color_jitter=0.8, three_augment=True)
    alone = stream(index, 0, 2, augmentations=[first])
    both = stream(index, 0, 2, augmentations=[first, second], world=2, num_workers=1)
    images = torch.cat([batch.images for step in both for batch in step])
    assert images.shape == (2 * BATCH, 2, *SIZE, 3)
    assert torch.equal(images[:, 0], torch.cat([batch.images for step in alone for batch in step]))
    assert (images[:, 0] != images[:, 1]).flatten(1).any(1).float().mean() > 0.9


def test_global_generator_is_not_used(index: Index) -> None:
    before = torch.get_rng_state()
    list(loader(index, num_workers=1).batches(0, 1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def bad_shards(tmp_path: Path) -> Path:
    """20 samples; 4, 5 and 19 cannot be decoded."""
    members = [(f"img{sample:02d}.jpg", jpeg(sample)) for sample in range(20)]
    members[4] = ("img04.jpg", jpeg(4, 200, 200)[:900])
    members[5] = ("img05.jpg", b"<html>")
    members[19] = ("img19.png", encode(smooth_image(0, 1, 1), "PNG"))
    write_tar(tmp_path / "bad.tar", members)
    return tmp_path


def test_bad_images_are_replaced_and_reported(bad_shards: Path) -> None:
    index = load_index(bad_shards)
    (step,) = stream(index, 0, 1, batch=20, accumulation=4)
    reports = sorted(chain(*(batch.skipped for batch in step)))
    assert [report[:2] for report in reports] == [("img04", "damaged"), ("img05", "no image"), ("img19", "too small")]
    assert "truncated" in reports[0].reason
    assert "not a JPEG" in reports[1].reason
    assert "1 x 1" in reports[2].reason
    shown = sorted(torch.cat([batch.samples for batch in step]).tolist())
    assert [shown.count(sample) for sample in (0, 4, 5, 6, 19)] == [2, 0, 0, 3, 0]
    assert_same(stream(index, 0, 3, world=2, batch=20, num_workers=1), stream(index, 0, 3, batch=20))


def test_only_bad_images_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "bad.tar", [(f"img{sample:03d}.jpg", b"bad") for sample in range(120)])
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"the 100 after it cannot be decoded .*data.verify SHARDS --decode"):
            list(loader(load_index(tmp_path), num_workers=workers).batches(0, 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_changed_shard_is_a_clear_error(shards: Path, index: Index, workers: int) -> None:
    path = shards / index.shards[0]
    path.write_bytes(path.read_bytes()[512:] + b"\0" * 512)
    with pytest.raises(ValueError, match=r"train-000000.tar: the index does not match") as caught:
        list(loader(index, num_workers=workers).batches(0, 1))
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 25, "world_size": 4, "accumulation": 2}, "set train.global_batch_size to 24 or 32"),
        ({"batch": 8, "world_size": 3}, "to 6 or 9, or start 2 ranks [(]a run that continues keeps its batch size[)]"),
        ({"batch": 54}, "53 samples are fewer than one global batch of 54"),
        ({"seed": -1}, "seed"),
        ({"num_workers": -1}, "num_workers"),
    ],
)
def test_invalid_settings_are_rejected(index: Index, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(index, **settings)


def _die(rng: np.random.Generator, parent: int) -> dict[str, np.ndarray]:
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_killed_worker_is_an_error_not_a_hang(index: Index) -> None:
    start = time.monotonic()
    with pytest.raises(
        ChildProcessError, match=r"a data worker \(process \d+\) was killed by SIGKILL.* lower data.num_workers"
    ):
        list(loader(index, num_workers=2, mask_sampler=partial(_die, parent=os.getpid())).batches(0, 4))
    assert time.monotonic() - start < 30


def test_signals_to_the_whole_job_do_not_affect_workers(index: Index) -> None:
    """As sent by a scheduler, but here only to the workers."""
    steps = loader(index, num_workers=2).batches(0, 8)
    ours = [next(steps), next(steps)]  # one from each worker, so both have started
    for worker in multiprocessing.active_children():
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            os.kill(worker.pid or 0, number)
    ours += steps
    assert_same(ours, stream(index, 0, 8))


def test_closing_early_stops_the_workers(index: Index) -> None:
    steps = loader(index, num_workers=2).batches(0, 100)
    next(steps)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    steps.close()
    assert not any(worker.is_alive() for worker in workers)


def test_crash_with_running_workers_exits(shards: Path, index: Index) -> None:
    """Python joins its children at exit, and the workers ignore SIGTERM."""
    program = (
        "import sys; from data.index import load_index; from data.loader import Loader\n"
        "steps = Loader(load_index(sys.argv[1]), size=(8, 8), batch=4, seed=0, num_workers=2).batches(0, 10**6)\n"
        "next(steps)\n"
        "raise KeyError('crash')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(shards)], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("KeyError: 'crash'")


def test_spawned_workers(index: Index) -> None:
    """Everything that is sent to a worker can be pickled."""
    previous = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        ours = stream(index, 0, 3, num_workers=1)
    finally:
        multiprocessing.set_start_method(previous, force=True)
    assert_same(ours, stream(index, 0, 3))
