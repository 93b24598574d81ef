"""The loader beside others, on the same photographs: CPU time and rate, by the number of workers.

    python benchmarks/loader_peers.py PHOTOGRAPHS.tar [--quick] [--workers 0 1 2] [--size 224]

The JPEGs of PHOTOGRAPHS.tar are written in each loader's own format. Each loader reads all of them in the way its users
write it: its own random crops (0.2 to 1, bicubic), flips, batches of 32. Loaders that are not installed are left out,
and this is reported; `pip install litdata mosaicml-streaming nvidia-dali-cuda120` installs them.

- `ours`: `data.loader.Loader`; uint8, normalized on the GPU. `ours_repeats2`: with `data.repeats=2`, per crop.
- `torchvision`: ImageFolder (Pillow), its transforms, torch's DataLoader.
- `webdataset`: `decode("pil")` and the same transforms, from the same shards as `ours`.
- `litdata`: optimized chunks, which it decodes with torchvision; transforms on tensors.
- `mosaicml_streaming`: MDS shards with a column of JPEGs (Pillow), and torchvision's transforms.
- `dali_cpu`: `readers.webdataset` on our shards, `image_random_crop` and resize on the CPU; `workers` is its threads.

Reported are milliseconds of CPU time per photograph, over the main process and all others, and photographs per second,
in one pass after a warm-up pass; medians over rounds, in which all loaders take turns. CPU time hardly depends on other
work on the machine. The rate does: it needs one idle core more than there are workers.

The last line is one JSON object; `ratio_NAME_W` is ours to that loader, by CPU time, with W workers.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

from benchmarks.loader import MEAN, STD, extract
from data.index import load_index
from data.loader import Loader
from data.pack import pack
from data.sources import list_source

BATCH = 32
SCALE = (0.2, 1.0)


class Sources(NamedTuple):
    """The same photographs in every format."""

    folder: Path  # contains a folder of JPEGs
    shards: Path
    other: Path  # for other loaders' formats

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*/*"))


Batches = Iterator[int]  # makes a batch each time; yields its number of photographs


def transform(size: int) -> Callable[[Any], torch.Tensor]:
    """torchvision's usual transform, for Pillow images or tensors."""
    crop = v2.RandomResizedCrop(size, SCALE, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    return v2.Compose([crop, v2.RandomHorizontalFlip(), *to_float])


def _passes(make: Callable[[int], Iterator[Any]], count: int) -> Batches:
    """Counts the batches of several epochs; a batch is a tensor, or a tuple that begins with one."""
    for epoch in range(count):
        for batch in make(epoch):
            yield len(batch if isinstance(batch, torch.Tensor) else batch[0])


def _loader_options(workers: int) -> dict[str, Any]:
    return {"batch_size": BATCH, "num_workers": workers, "persistent_workers": workers > 0, "drop_last": True}


def ours(sources: Sources, size: int, workers: int, passes: int, repeats: int = 1) -> Batches:
    loader = Loader(
        load_index(sources.shards), size=(size, size), batch=BATCH, seed=0, num_workers=workers, repeats=repeats
    )
    return _passes(lambda _: (batch.images for (batch,) in loader.batches(0, passes * loader.steps_per_epoch)), 1)


def torchvision(sources: Sources, size: int, workers: int, passes: int) -> Batches:
    photographs = datasets.ImageFolder(sources.folder, transform(size))
    loader = DataLoader(photographs, shuffle=True, **_loader_options(workers))
    return _passes(lambda _: iter(loader), passes)


def webdataset(sources: Sources, size: int, workers: int, passes: int) -> Batches:
    import webdataset as wds

    shards = [str(path) for path in sorted(sources.shards.glob("*.tar"))]
    samples = wds.WebDataset(shards, shardshuffle=len(shards), empty_check=False, workersplitter=_split)
    samples = samples.shuffle(1000).decode("pil").to_tuple("jpg").map_tuple(transform(size)).batched(BATCH)
    loader = wds.WebLoader(samples, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    return _passes(lambda _: iter(loader), passes)


def _split(shards: Iterator[Any]) -> Iterator[Any]:
    import webdataset as wds

    return wds.split_by_worker(shards)  # a module-level function, because the class's default cannot be pickled


def litdata(sources: Sources, size: int, workers: int, passes: int) -> Batches:
    import litdata

    chunks = sources.other / "litdata"
    if not chunks.exists():
        files = [str(path) for path in sources.files()]
        litdata.optimize(Image.open, files, str(chunks), chunk_bytes="16MB", num_workers=1, verbose=False)
        multiprocessing.set_start_method("fork", force=True)  # restores the system's default, which litdata changed
    change = transform(size)

    class Photographs(litdata.StreamingDataset):
        def __getitem__(self, index: Any) -> torch.Tensor:
            return change(super().__getitem__(index))

    photographs = Photographs(str(chunks), shuffle=True, drop_last=False)
    loader = litdata.StreamingDataLoader(photographs, **_loader_options(workers))
    return _passes(lambda _: iter(loader), passes)


def mosaicml_streaming(sources: Sources, size: int, workers: int, passes: int) -> Batches:
    import streaming

    shards = sources.other / "mds"
    if not shards.exists():
        with streaming.MDSWriter(out=str(shards), columns={"image": "jpeg"}) as writer:
            for path in sources.files():
                writer.write({"image": Image.open(path)})
    change = transform(size)

    class Photographs(streaming.StreamingDataset):
        def __getitem__(self, index: Any) -> torch.Tensor:
            return change(super().__getitem__(index)["image"].convert("RGB"))

    photographs = Photographs(local=str(shards), shuffle=True, batch_size=BATCH, allow_unsafe_types=False)
    loader = DataLoader(photographs, **_loader_options(workers))
    return _passes(lambda _: iter(loader), passes)


def dali_cpu(sources: Sources, size: int, workers: int, passes: int) -> Batches:
    from nvidia.dali import fn, pipeline_def, types

    shards = [str(path) for path in sorted(sources.shards.glob("*.tar"))]
    scaled = [[255 * value for value in values] for values in (MEAN, STD)]

    @pipeline_def(batch_size=BATCH, num_threads=max(workers, 1), device_id=None, seed=0)
    def pipeline() -> Any:
        files = fn.readers.webdataset(paths=shards, ext=["jpg"], random_shuffle=True)
        images = fn.decoders.image_random_crop(files, device="cpu", random_area=SCALE, output_type=types.RGB)
        resized = fn.resize(images, size=(size, size), interp_type=types.INTERP_CUBIC, antialias=True)
        flip = fn.random.coin_flip(probability=0.5)
        return fn.crop_mirror_normalize(resized, mirror=flip, mean=scaled[0], std=scaled[1], output_layout="CHW")

    made = pipeline()
    made.build()
    steps = len(sources.files()) // BATCH

    def one_pass(_: int) -> Iterator[torch.Tensor]:
        for _step in range(steps):
            (images,) = made.run()
            yield torch.from_numpy(images.as_array())

    return _passes(one_pass, passes)


class Contender(NamedTuple):
    """A loader and the package that it needs; ours and torchvision need only our dependencies."""

    make: Callable[[Sources, int, int, int], Batches]
    package: str = "torch"


CONTENDERS = {
    "ours": Contender(ours),
    "ours_repeats2": Contender(partial(ours, repeats=2)),
    "torchvision": Contender(torchvision),
    "webdataset": Contender(webdataset, "webdataset"),
    "litdata": Contender(litdata, "litdata"),
    "mosaicml_streaming": Contender(mosaicml_streaming, "streaming"),
    "dali_cpu": Contender(dali_cpu, "nvidia.dali"),
}


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def _cpu_seconds() -> float:
    """CPU seconds of this process and its live descendants."""
    below = psutil.Process().children(recursive=True)
    return time.process_time() + sum(sum(process.cpu_times()[:2]) for process in below)


def time_pass(contender: Contender, sources: Sources, size: int, workers: int, photographs: int) -> tuple[float, float]:
    """CPU seconds and elapsed seconds per photograph, in the second pass."""
    batches, seen, started = contender.make(sources, size, workers, 3), 0, (0, 0.0, 0.0)
    for count in batches:
        seen += count
        if not started[0] and seen >= photographs // BATCH * BATCH:
            started = seen, _cpu_seconds(), time.perf_counter()
        if started[0] and seen >= 2 * started[0]:
            break
    spent, passed, measured = _cpu_seconds() - started[1], time.perf_counter() - started[2], seen - started[0]
    getattr(batches, "close", lambda: None)()
    return spent / measured, passed / measured


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python benchmarks/loader_peers.py", description=__doc__.split("\n")[0])
    parser.add_argument("photographs", metavar="PHOTOGRAPHS.tar", type=Path)
    parser.add_argument("--quick", action="store_true", help="64 photographs, one round")
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({0, 1, len(os.sched_getaffinity(0))}))
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = {name: contender for name, contender in CONTENDERS.items() if installed(contender.package)}
    for name in CONTENDERS.keys() - found.keys():
        print(f"{name}: not installed, left out")
    rounds: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        sources = Sources(*(Path(temporary) / name for name in ("folder", "shards", "other")))
        (sources.folder / "all").mkdir(parents=True)
        sources.other.mkdir()
        extract(args.photographs, sources.folder / "all", 64 if args.quick else None)
        for path in sources.files():
            if path.read_bytes()[:3] != b"\xff\xd8\xff":
                path.unlink()
        photographs = len(pack(list_source(sources.folder, labels=False), sources.shards, samples_per_shard=64))
        for _ in range(1 if args.quick else 3):
            for workers in args.workers:
                for name, contender in found.items():
                    rounds[name, workers].append(time_pass(contender, sources, args.size, workers, photographs))
    print(
        f"{photographs} photographs at {args.size} pixels; ms of CPU time, photographs/s, CPU time / ours, by workers"
    )
    figures: dict[str, float] = {}
    for name in found:
        cells = []
        for workers in args.workers:
            cpu, wall = (statistics.median(times) for times in zip(*rounds[name, workers], strict=True))
            both = zip(rounds[name, workers], rounds["ours", workers], strict=True)
            ratio = statistics.median(one[0] / our[0] for one, our in both)
            figures |= {f"cpu_ms_{name}_{workers}": round(1000 * cpu, 3), f"per_s_{name}_{workers}": round(1 / wall, 1)}
            figures[f"ratio_{name}_{workers}"] = round(ratio, 3)
            cells.append(f"{workers}: {1000 * cpu:6.2f} {1 / wall:6.0f} {ratio:5.2f}")
        print(f"{name:>20}  " + "   ".join(cells))
    print(json.dumps({**figures, "photographs": photographs, "size": args.size, "quick": args.quick}))


if __name__ == "__main__":
    main()
