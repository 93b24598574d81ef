"""Computes the principal components of patches, for MAE's PCA target: ``python -m pretrain.fit_pca SHARDS OUT``.

Takes the random crops of a run's first epoch and accumulates mean and covariance of their standardized patches in
float64. The same shards and options give the same components, whatever the number of workers.
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.cores import available_cores
from data.index import load_index
from data.loader import Loader
from data.parallel import report_errors
from pretrain.methods.targets.pca import principal_components
from pretrain.models.patches import normalize_pixels, patchify, values_per_patch
from pretrain.trainer.safetensors_file import save_state_dict

REMOTE_SHARDS = 8  # shards of a store that are fetched and shuffled together
BATCH = 32  # limits memory: 32 crops of 224 px are 6272 patches, 38 MB in float64


class Covariance:
    """Accumulates mean and covariance of patches of P values, in float64."""

    def __init__(self, num_values: int):
        self.count = 0
        self.sum = torch.zeros(num_values, dtype=torch.float64)
        self.products = torch.zeros(num_values, num_values, dtype=torch.float64)

    def add(self, patches: Tensor) -> None:
        """(n, P) standardized patches."""
        patches = patches.double()
        self.count += len(patches)
        self.sum += patches.sum(0)
        self.products += patches.T @ patches

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean (P,) and unbiased covariance (P, P)."""
        mean = self.sum / self.count
        return mean, (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)


def fit(
    shards: str, *, patch_size: int, components: int, images: int, image_size: int, seed: int, num_workers: int
) -> tuple[dict[str, Tensor], float]:
    """The file's tensors, `mean` (P,), `components` (K, P), `variance` (K,), and the share of variance they explain.

    Raises:
        ValueError: settings that do not fit together, or unusable shards.
    """
    num_values = values_per_patch(patch_size)
    if min(patch_size, images) < 1:
        raise ValueError(f"--patch-size {patch_size} and --images {images} must be at least 1")
    if image_size % patch_size:
        raise ValueError(f"--image-size {image_size} is not a multiple of --patch-size {patch_size}")
    if not 0 < components <= num_values:
        raise ValueError(
            f"--components {components}: must be 1 to {num_values} for patches of {patch_size}x{patch_size} pixels"
        )
    index = load_index(shards)
    batch = min(BATCH, images, len(index))
    loader = Loader(
        index,
        size=(image_size, image_size),
        batch=batch,
        seed=seed,
        num_workers=num_workers,
        shuffle_shards=REMOTE_SHARDS if index.is_remote else 0,
    )
    steps = min(images // batch, loader.steps_per_epoch)
    covariance = Covariance(num_values)
    for (micro_batch,) in tqdm(loader.batches(0, steps), total=steps, desc="covariance", unit="batch", disable=None):
        covariance.add(normalize_pixels(patchify(micro_batch.images, patch_size)).flatten(0, 1))
    if covariance.count <= num_values:
        raise ValueError(
            f"{covariance.count} patches are too few for {num_values} components: pack more images, or raise --images"
        )
    mean, matrix = covariance.result()
    vectors, variance = principal_components(matrix, components)
    tensors = {"mean": mean, "components": vectors, "variance": variance}
    explained = float(variance.sum() / matrix.trace())
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}, explained


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", metavar="SHARDS", help="a folder of tar shards, one tar, or a brace pattern")
    parser.add_argument("out", metavar="OUT", type=Path, help="the file to write, for example pca16.safetensors")
    parser.add_argument(
        "--patch-size", type=int, default=16, help="side of a patch in pixels: the run's model.patch_size"
    )
    parser.add_argument("--components", type=int, default=96, help="how many of the largest to keep; 96 in MAE's paper")
    parser.add_argument("--images", type=int, default=10_000, help="how many crops to use, at most one epoch")
    parser.add_argument(
        "--image-size", type=int, default=224, help="side of a crop in pixels: the run's data.image_size"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random crops")
    parser.add_argument("--num-workers", type=int, default=available_cores(), help="number of decoding processes")
    options = vars(parser.parse_args(argv))
    out: Path = options.pop("out")

    def write() -> int:
        out.parent.mkdir(parents=True, exist_ok=True)
        tensors, explained = fit(**options)
        save_state_dict(tensors, {}, out)
        print(
            f"{out}: {options['components']} of {values_per_patch(options['patch_size'])} components, "
            f"{explained:.1%} of the variance"
        )
        print(f"target.name=pca target.file={out}")
        print(f"target.sha256={hashlib.sha256(out.read_bytes()).hexdigest()}")
        return 0

    return report_errors(write)


if __name__ == "__main__":
    sys.exit(main())
