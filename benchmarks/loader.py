"""Photographs per second on one core: ours, torchvision's usual pipeline, and bare decoding as the limit.

    python benchmarks/loader.py PHOTOGRAPHS.tar [--quick]

PHOTOGRAPHS.tar is any tar of photographs, such as a few hundred from ImageNet's training set. They are packed twice: as
they are, and with ``--short-side 288 --quality 90``. A single-threaded process does everything, timed in CPU seconds,
so that other work on the machine matters little. Contenders take turns at the same eight photographs. Each round covers
all photographs; ratios are computed within a round, and their median over rounds is reported.

- `usual`: what ImageFolder does (PIL), RandomResizedCrop (0.2 to 1, bicubic), a flip, ToTensor and Normalize, from
  files in a folder, without collating batches. It draws its own crop as always, and then uses ours.
- `ours`: micro-batches of `data.loader.Loader` from shards, in uint8, because the GPU normalizes them.
- `ours_repeats2`: the same with `data.repeats=2`, two crops per decode; its times and rates are per crop.
- `limit`: torchvision decodes the whole file and does nothing else.

The last line of the output is one JSON object. `ratio_224` and `ratio_448` compare ours to usual, `ratio_224_repeats2`
with two crops per decode. `ratio_224_packed288` compares ours on the shrunk photographs to usual on the whole ones;
`share_of_limit_*` compare ours to the limit on the same files. `loader_peers.py` compares other loaders.
"""

import argparse
import json
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets.folder import default_loader
from torchvision.io import ImageReadMode, decode_jpeg, read_file

from data.index import Index
from data.loader import Loader
from data.order import Stream, sample_rng
from data.pack import pack
from data.reader import ShardReader
from data.scan import IMAGE_EXTENSIONS
from data.shrink import Shrink
from data.sources import list_source
from data.transforms import Augmentation, flip_decision

BATCH = 8
SIZES = (224, 448)
REPEATS = 2
SHRINK = Shrink(288, 90)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Contender = Callable[[Sequence[int]], object]  # handles the photographs of these numbers


def extract(tar: Path, folder: Path, limit: int | None) -> int:
    """Extracts the photographs of a tar into a folder, with numbers as names; returns how many."""
    count = 0
    with tarfile.open(tar) as members:
        for member in members:
            suffix = Path(member.name).suffix.lower()
            if member.isfile() and suffix[1:] in IMAGE_EXTENSIONS and (limit is None or count < limit):
                content = members.extractfile(member)
                assert content is not None
                (folder / f"{count:06d}{suffix}").write_bytes(content.read())
                count += 1
    if count < BATCH:
        raise SystemExit(f"{tar}: {count} photographs, but at least {BATCH} are needed")
    return count


class _SameCrop(transforms.RandomResizedCrop):
    """Draws as usual, but then uses a given box."""

    box: tuple[int, int, int, int]  # left, top, right, bottom

    def forward(self, image: Image.Image) -> Image.Image:
        self.get_params(image, self.scale, self.ratio)
        left, top, right, bottom = self.box
        rows, cols = bottom - top, right - left
        return transforms.functional.resized_crop(image, top, left, rows, cols, self.size, self.interpolation)


def same_box(size: int, seed: int, number: int, image: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box that the loader crops from a sample in the first epoch."""
    rng, augmentation = sample_rng(seed, 0, number, Stream.CROP), Augmentation()
    flip_decision(rng, augmentation.flip)
    left, top, right, bottom = augmentation.box(rng, *image, (size, size))
    return int(left), int(top), int(right), int(bottom)


def usual(files: Sequence[Path], size: int, seed: int) -> Contender:
    """torchvision's pipeline."""
    crop = _SameCrop(size, (0.2, 1), interpolation=transforms.InterpolationMode.BICUBIC)
    after = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    pipeline = transforms.Compose([crop, *after])

    def make(number: int) -> torch.Tensor:
        image = default_loader(str(files[number]))
        crop.box = same_box(size, seed, number, image.size)
        return pipeline(image)

    return lambda numbers: [make(number) for number in numbers]


def limit(files: Sequence[Path]) -> Contender:
    """Bare decoding."""
    return lambda numbers: [decode_jpeg(read_file(str(files[number])), ImageReadMode.RGB) for number in numbers]


def ours(index: Index, size: int, seed: int, repeats: int = 1) -> Iterator[Sequence[int]]:
    """Makes micro-batches in the loader's order; yields the numbers of each one's photographs."""
    loader = Loader(index, size=(size, size), batch=BATCH, seed=seed, repeats=repeats)
    for (batch,) in loader.batches(0, repeats * loader.steps_per_epoch):
        yield batch.samples.tolist()


def time_round(index: Index, shrunk: Index, files: dict[str, list[Path]], size: int, seed: int) -> dict[str, float]:
    """CPU seconds per photograph for each contender."""
    torch.manual_seed(seed)
    spent: dict[str, float] = defaultdict(float)
    others = {
        "usual": usual(files["whole"], size, seed),
        "limit": limit(files["whole"]),
        "limit_packed288": limit(files["shrunk"]),
    }

    def timed(name: str, work: Callable[[], Any]) -> Any:
        before = time.process_time()
        made = work()
        spent[name] += time.process_time() - before
        return made

    whole_batches, shrunk_batches = ours(index, size, seed), ours(shrunk, size, seed)
    repeated = ours(index, size, seed, REPEATS)
    steps = len(index) // BATCH
    for _ in range(steps):
        numbers = timed("ours", partial(next, whole_batches))
        assert timed("ours_packed288", partial(next, shrunk_batches)) == numbers, "both in the same order"
        for _ in range(REPEATS):  # this covers all photographs once, too
            timed("ours_repeats2", partial(next, repeated))
        for name, contender in others.items():
            timed(name, partial(contender, numbers))
    spent["ours_repeats2"] /= REPEATS
    return {name: seconds / (BATCH * steps) for name, seconds in spent.items()}


def summarize(rounds: dict[int, list[dict[str, float]]]) -> dict[str, float]:
    """Medians over rounds of the ratios and rates."""

    def ratio(size: int, slower: str, faster: str) -> float:
        return round(statistics.median(times[slower] / times[faster] for times in rounds[size]), 3)

    figures: dict[str, float] = {f"ratio_{size}": ratio(size, "usual", "ours") for size in SIZES}
    for setting in ("repeats2", "packed288"):
        figures |= {f"ratio_{size}_{setting}": ratio(size, "usual", f"ours_{setting}") for size in SIZES}
    figures |= {f"share_of_limit_{size}": ratio(size, "limit", "ours") for size in SIZES}
    figures["share_of_limit_224_packed288"] = ratio(224, "limit_packed288", "ours_packed288")
    for size in SIZES:
        for name in rounds[size][0]:
            figures[f"{name}_{size}_per_s"] = round(1 / statistics.median(times[name] for times in rounds[size]), 1)
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python benchmarks/loader.py", description=__doc__.split("\n")[0])
    parser.add_argument("photographs", metavar="PHOTOGRAPHS.tar", type=Path)
    parser.add_argument("--quick", action="store_true", help="64 photographs, two rounds")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "photographs"
        folder.mkdir()
        extract(args.photographs, folder, 64 if args.quick else None)
        source = list_source(folder, labels=False)
        index = pack(source, Path(temporary) / "whole")
        shrunk = pack(source, Path(temporary) / "shrunk", shrink=SHRINK)
        (small := Path(temporary) / "small").mkdir()
        files = {"whole": [folder / file.name for file in source.files], "shrunk": list(_unpack(shrunk, small))}
        rounds = {
            size: [time_round(index, shrunk, files, size, seed) for seed in range(2 if args.quick else 3)]
            for size in SIZES
        }
    figures = summarize(rounds)
    print(f"{len(index)} photographs of {index.length.mean() / 1e3:.0f} kB, shrunk {shrunk.length.mean() / 1e3:.0f} kB")
    print("photographs/s of one core    " + "".join(f"{name:>17}" for name in rounds[SIZES[0]][0]))
    for size in SIZES:
        print(f"{size:>28} " + "".join(f"{figures[f'{name}_{size}_per_s']:17.0f}" for name in rounds[size][0]))
    kept = {"photographs": len(index), "quick": args.quick, "cpu": platform.machine(), "torch": torch.__version__}
    print(json.dumps({**figures, **kept}))


def _unpack(index: Index, folder: Path) -> Iterator[Path]:
    """Writes the samples of shards into files, in their order."""
    reader = ShardReader(index)
    for sample in range(len(index)):
        path = folder / f"{sample:06d}"
        path.write_bytes(reader.read(sample))
        yield path


if __name__ == "__main__":
    main()
