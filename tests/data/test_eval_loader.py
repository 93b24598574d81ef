import io
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.shard_tools import encode, jpeg, smooth_image, write_tar
from PIL import Image
from torchvision.transforms import functional as tv

from data.eval_loader import PADDING, EvalBatch, EvalLoader
from data.image_folder import Folder, list_folder, load_samples
from data.index import Index, load_index

SIZE = (16, 24)


def batches_of_ranks(samples: Index | Folder, world: int, batch: int, **settings: object) -> list[list[EvalBatch]]:
    """Returns the batches of each rank."""
    return [
        list(EvalLoader(samples, size=SIZE, batch=batch, rank=rank, world_size=world, **settings).batches())  # type: ignore[arg-type]
        for rank in range(world)
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 4, 7, 64])
def test_every_sample_comes_once_and_ranks_have_equally_many_batches(index: Index, world: int, batch: int) -> None:
    """53 is a prime number, so most batch sizes leave an incomplete last batch."""
    ranks = batches_of_ranks(index, world, batch)
    assert {len(batches) for batches in ranks} == {-(-53 // (batch * world))}
    assert {len(b.samples) for batches in ranks for b in batches} == {batch}
    in_order = [b for number in range(len(ranks[0])) for b in (batches[number] for batches in ranks)]
    samples = torch.cat([b.samples for b in in_order])
    assert samples[:53].tolist() == list(range(53))  # in the order of the index
    assert (samples[53:] == PADDING).all()
    labels, readable = (torch.cat([getattr(b, name) for b in in_order]) for name in ("labels", "readable"))
    assert labels[:53].tolist() == index.label.tolist()
    assert readable.tolist() == [sample != PADDING for sample in samples.tolist()]


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_workers(index: Index, workers: int) -> None:
    for ours, plain in zip(
        batches_of_ranks(index, 2, 8, num_workers=workers), batches_of_ranks(index, 2, 8), strict=True
    ):
        for a, b in zip(ours, plain, strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.samples, b.samples)


def test_crops_match_torchvisions_resize_256_and_crop_224(tmp_path: Path) -> None:
    """torchvision rounds the intermediate size, which shifts edges by a fraction of a pixel."""
    write_tar(tmp_path / "one.tar", [("a.png", encode(smooth_image(0, 400, 300), "PNG"))])
    (batch,) = EvalLoader(load_index(tmp_path), size=(224, 224), batch=1).batches()
    theirs = tv.center_crop(tv.resize(smooth_image(0, 400, 300), 256, tv.InterpolationMode.BICUBIC), 224)
    difference = np.abs(batch.images[0].numpy().astype(int) - np.asarray(theirs).astype(int))
    assert difference.mean() < 1
    assert difference.max() <= 5


def test_above_224_pixels_the_whole_short_side_is_used(tmp_path: Path) -> None:
    write_tar(tmp_path / "one.tar", [("a.png", encode(smooth_image(0, 400, 300), "PNG"))])
    (batch,) = EvalLoader(load_index(tmp_path), size=(384, 384), batch=1).batches()
    theirs = smooth_image(0, 400, 300).crop((50, 0, 350, 300)).resize((384, 384), Image.Resampling.BICUBIC)
    assert np.abs(batch.images[0].numpy().astype(int) - np.asarray(theirs).astype(int)).max() <= 2


def test_border_is_never_used(tmp_path: Path) -> None:
    framed = Image.new("RGB", (60, 44), (255, 0, 0))
    framed.paste(Image.new("RGB", (56, 40), (0, 0, 255)), (2, 2))
    write_tar(tmp_path / "one.tar", [("a.png", encode(framed, "PNG"))])
    index = load_index(tmp_path)
    (with_border,) = EvalLoader(index, size=(300, 300), batch=1).batches()
    (without,) = EvalLoader(index, size=(300, 300), batch=1, border=2).batches()
    assert (with_border.images[..., 0] > 128).any()
    assert (without.images == torch.tensor([0, 0, 255])).all()


def test_undecodable_image_keeps_its_position(tmp_path: Path) -> None:
    members = [(f"{sample}.jpg", jpeg(sample)) for sample in range(5)]
    members[2] = ("2.jpg", b"<html>")
    write_tar(tmp_path / "bad.tar", members)
    (batch,) = EvalLoader(load_index(tmp_path), size=SIZE, batch=6).batches()
    assert batch.samples.tolist() == [0, 1, 2, 3, 4, PADDING]
    assert batch.readable.tolist() == [True, True, False, True, True, False]
    assert batch.images.flatten(1).any(1).tolist() == batch.readable.tolist()


def test_subset_of_samples(index: Index) -> None:
    batches = batches_of_ranks(index, 2, 3, subset=np.array([3, 17, 18, 40, 52, 50 + 1])[[0, 1, 2, 3, 5, 4]])
    assert [[b.samples.tolist() for b in rank] for rank in batches] == [[[3, 17, 18]], [[40, 51, 52]]]


def test_folder_gives_the_same_batches_as_its_shards(tmp_path: Path) -> None:
    from data.pack import pack
    from data.sources import list_source

    for number in range(7):
        path = tmp_path / "photos" / f"class {number % 3}" / f"img.{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number, 40 + number, 50))
    packed = pack(list_source(tmp_path / "photos"), tmp_path / "shards")
    folder = load_samples(tmp_path / "photos")
    assert isinstance(folder, Folder)
    assert isinstance(load_samples(tmp_path / "shards"), Index)
    assert folder.classes == packed.classes == ("class 0", "class 1", "class 2")
    assert list(folder.keys) == list(packed.keys)
    (ours,), (theirs,) = (batches_of_ranks(samples, 1, 7, num_workers=1)[0] for samples in (folder, packed))
    assert torch.equal(ours.images, theirs.images)
    assert torch.equal(ours.labels, theirs.labels)
    direct = np.asarray(Image.open(io.BytesIO((tmp_path / "photos" / "class 1" / "img.4.jpg").read_bytes())))
    position = list(folder.keys).index("class_1/img_4")
    assert abs(float(ours.images[position].float().mean()) - direct[4:-4].mean()) < 6


def test_deleted_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    folder = list_folder(tmp_path)
    (tmp_path / "a.jpg").unlink()
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"a\.jpg: the file has disappeared since it was listed") as caught:
            list(EvalLoader(folder, size=SIZE, batch=1, num_workers=workers).batches())
        assert "Traceback" not in str(caught.value)


def test_closing_early_stops_workers_which_ignore_signals(index: Index) -> None:
    batches = EvalLoader(index, size=SIZE, batch=1, num_workers=2).batches()
    for _ in range(2):  # one from each worker, so both have started
        next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid or 0, signal.SIGTERM)
    next(batches)
    batches.close()
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("settings", [{"batch": 0}, {"batch": 1, "num_workers": -1}])
def test_invalid_settings_are_rejected(index: Index, settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        EvalLoader(index, size=SIZE, **settings)  # type: ignore[arg-type]
