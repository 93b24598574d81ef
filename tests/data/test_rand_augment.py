"""RandAugment equals timm's but depends on the sample's generator alone; labels belong to the images shown."""

import io
import random
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from helpers.shard_tools import jpeg, smooth_image, write_tar
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN
from timm.data.transforms_factory import transforms_imagenet_train

from data.augment import rand_augment
from data.index import Index, load_index
from data.loader import Loader
from data.order import Stream, sample_rng
from data.transforms import Augmentation, flip_decision

POLICY = "rand-m9-mstd0.5-inc1"


def test_rand_augment_equals_timms_pipeline():
    """Images for which Pillow rejects timm's own call must not raise here; see `augment._posterize`."""
    pipeline = transforms_imagenet_train(64, auto_augment=POLICY, interpolation="bicubic", mean=IMAGENET_DEFAULT_MEAN)
    (theirs,) = (step for step in pipeline.transforms if type(step).__name__ == "RandAugment")
    pixels, changed, compared = np.asarray(smooth_image(0, 64, 64)), 0, 0
    for sample in range(300):
        seed = int(np.random.default_rng(sample).random() * 2**32)
        random.seed(seed)
        np.random.seed(seed)
        ours = rand_augment(np.random.default_rng(sample), pixels, POLICY)
        with suppress(ValueError):  # Pillow may reject timm's own call
            np.testing.assert_array_equal(ours, np.asarray(theirs(Image.fromarray(pixels))))
            compared += 1
        changed += bool((ours != pixels).any())
    assert compared > 280
    assert 150 < changed < 290, "each of two operations is applied with probability 0.5, and some change nothing"


def test_global_random_state_is_neither_changed_nor_used():
    pixels = np.asarray(smooth_image(0, 48, 48))
    random.seed(1)
    np.random.seed(2)
    before = random.getstate(), np.random.get_state()[1].tolist()
    first = rand_augment(np.random.default_rng(3), pixels, POLICY)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    random.seed(4)
    np.random.seed(5)
    np.testing.assert_array_equal(first, rand_augment(np.random.default_rng(3), pixels, POLICY))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_augments_crops_with_the_samples_generator(index: Index, workers: int):
    plain = Loader(index, size=(32, 32), batch=8, seed=5)
    augmented = Loader(
        index, size=(32, 32), batch=8, seed=5, augmentations=(Augmentation(rand_augment=POLICY),), num_workers=workers
    )
    steps = plain.steps_per_epoch
    for (before,), (after,) in zip(plain.batches(steps, steps + 3), augmented.batches(steps, steps + 3), strict=True):
        for i, sample in enumerate(before.samples.tolist()):
            rng = sample_rng(5, 1, sample, Stream.CROP)
            flip_decision(rng, 0.5)
            data = index.root.joinpath(index.shards[index.shard_of(sample)]).read_bytes()
            start, length = int(index.offset[sample]), int(index.length[sample])
            width, height = Image.open(io.BytesIO(data[start : start + length])).size
            Augmentation().box(rng, width, height, (32, 32))
            expected = rand_augment(rng, before.images[i].numpy(), POLICY)
            np.testing.assert_array_equal(after.images[i].numpy(), expected)


@pytest.mark.parametrize("policy", ["rand-q9", "rand", "rand-m", "auto", "rand-m9-", "rand-m9-mstd0.5-foo"])
def test_policy_that_timm_would_ignore_or_assert_on_is_rejected(policy: str):
    with pytest.raises(ValueError, match="not in timm's notation"):
        Augmentation(rand_augment=policy)


def test_labels_belong_to_the_images_shown_even_for_replacements(tmp_path: Path):
    members = []
    for sample in range(40):
        data = b"no image" if sample % 5 == 0 else jpeg(sample)
        members += [(f"{sample:02d}.jpg", data), (f"{sample:02d}.cls", str(sample).encode())]
    write_tar(tmp_path / "train-000000.tar", members)
    replaced = 0
    for (batch,) in Loader(load_index(tmp_path), size=(16, 16), batch=10, seed=0, labels=True).batches(0, 4):
        assert batch.labels.tolist() == [int(key) for key in batch.keys]
        assert all(label % 5 for label in batch.labels.tolist())
        replaced += len(batch.skipped)
    assert replaced == 8
    ((unlabeled,),) = Loader(load_index(tmp_path), size=(16, 16), batch=10, seed=0).batches(0, 1)
    assert unlabeled.labels is None
