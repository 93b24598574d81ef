"""The quick start's photographs: ``python -m data.samples OUT`` makes small shards without a download.

The photographs come with the packages scikit-image and scikit-learn. Overlapping crops of several scales are taken from
each: enough to watch a training run work, and far too little to train a useful encoder.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data.index import Index, load_index
from data.pack import pack
from data.parallel import report_errors
from data.sources import list_source

PHOTOGRAPHS = {
    "skimage/data": (
        "astronaut.png",
        "camera.png",
        "chelsea.png",
        "coffee.png",
        "hubble_deep_field.jpg",
        "motorcycle_left.png",
        "rocket.jpg",
    ),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
}
SHARES = ((1.0, 1), (0.8, 2), (0.6, 3), (0.45, 5))  # a crop's share of both sides, and the number of crops along each
SAMPLES_PER_SHARD = 64
JPEG_QUALITY = 90


def make_samples(out: Path) -> Index:
    """Writes ``out/photos/*.jpg`` and the shards ``out/*.tar``; does nothing if intact shards are there.

    Raises:
        ValueError: the packages are not installed, or ``out`` holds other shards.
    """
    if any(out.glob("*.tar")):
        return load_index(out)
    photos = out / "photos"
    photos.mkdir(parents=True, exist_ok=True)
    for path in tqdm(list(_find_photographs()), "cropping", unit="photo", disable=None):
        with Image.open(path) as image:
            for name, crop in _crops(image.convert("RGB")):
                target = photos / f"{path.stem}_{name}.jpg"
                if not target.exists():
                    temporary = target.with_suffix(".tmp")
                    crop.save(temporary, "JPEG", quality=JPEG_QUALITY)
                    temporary.replace(target)
    return pack(list_source(photos), out, samples_per_shard=SAMPLES_PER_SHARD)


def _find_photographs() -> Iterator[Path]:
    for folder, names in PHOTOGRAPHS.items():
        package, _, inside = folder.partition("/")
        spec = find_spec(package)  # finds without importing
        if spec is None or spec.origin is None:
            raise ValueError(
                f"the sample photographs come with the packages scikit-image and scikit-learn, and {package} is not "
                'installed: pip install -e ".[samples]"'
            )
        for name in names:
            path = Path(spec.origin).parent / inside / name
            if path.exists():  # releases differ in what they ship
                yield path


def _crops(image: Image.Image) -> Iterator[tuple[str, Image.Image]]:
    for share, along in SHARES:
        width, height = round(image.width * share), round(image.height * share)
        for row in range(along):
            for column in range(along):
                left = (image.width - width) * column // max(along - 1, 1)
                top = (image.height - height) * row // max(along - 1, 1)
                name = f"{round(share * 100):03d}_{row}{column}"
                yield name, image.crop((left, top, left + width, top + height))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data.samples", description=__doc__.split("\n")[0])
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the shards")
    args = parser.parse_args(argv)

    def command() -> int:
        index = make_samples(args.out)
        print(f"{len(index)} samples in {len(index.shards)} shards in {args.out}")
        return 0

    return report_errors(command)


if __name__ == "__main__":
    sys.exit(main())
