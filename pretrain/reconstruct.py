"""Draws what a run's newest checkpoint predicts for your images: `python -m pretrain.reconstruct RUN IMAGES OUT.png`.

RUN is the folder of a run: complete, stopped, killed, or still running. IMAGES are image files, a folder of them, or
shards. Central crops are shown; masks depend on --seed alone. Codes and features, which have no pixels, are drawn in
false colors. Whatever the run reads besides its checkpoint must exist: a tokenizer, components or a frozen teacher,
perhaps elsewhere (--set target.file=FILE), and a method of your own (--set method.module=FILE).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.batch import draw_masks
from data.eval_loader import EvalLoader
from data.image_folder import Samples
from data.parallel import report_errors
from data.pixel_format import RGB, PixelFormat, computable
from downstream.checkpoints.feature_teachers import read_feature_teacher
from downstream.checkpoints.files import read_source
from downstream.own_images import load_images
from pretrain.config import load
from pretrain.methods.base import Method
from pretrain.methods.targets.features import EMAConfig
from pretrain.reconstructions import draw_reconstructions, drawn_method
from pretrain.trainer.checkpoint_layout import latest_checkpoint, read_state
from pretrain.trainer.launch import choose_accelerator
from pretrain.trainer.run_folder import RunFolder


def load_trained(run: Path, overrides: list[str]) -> tuple[Method, tuple[int, int], str]:
    """The method of a run with the weights of its newest checkpoint, in eval mode.

    Args:
        run: its folder.
        overrides: of the run's configuration, `section.key=value`.

    Returns:
        The method whose predictions are drawn, the height and width of its images, and what its weights are, in words.

    Raises:
        ValueError: it is no pretraining run, has no checkpoint, or something else that it reads is gone.
    """
    choose_accelerator()
    from pretrain.build import build_method, feature_teacher  # imports DeepSpeed

    folder = RunFolder(run)
    if not folder.config.is_file():
        raise ValueError(f"{run} is not the folder of a run: it has no {folder.config.name}")
    config = load(str(folder.config), overrides)
    checkpoint = latest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        raise ValueError(f"{run} has no checkpoint, and an encoder file alone lacks the part that predicts pixels")
    method = build_method(config, read_feature_teacher(config.target, config.grid, config.model.patch_size))
    try:
        method.load_state_dict(read_source(checkpoint, "online").tensors)
        if isinstance(config.target, EMAConfig):
            teacher = feature_teacher(method)
            assert teacher is not None
            teacher.load_state_dict(read_source(checkpoint, "ema").tensors)
    except RuntimeError as error:
        raise ValueError(f"the weights in {checkpoint} do not fit {folder.config}: {error}") from None
    return (
        drawn_method(method).eval(),
        config.data.height_width,
        f"{config.name}: after {read_state(checkpoint).step} steps",
    )


def read_images(
    samples: Samples, size: tuple[int, int], count: int, format: PixelFormat = RGB
) -> tuple[Tensor, list[int]]:
    """The first images that can be decoded, (B, H, W, C), and their sample numbers; at most `count`.

    Raises:
        ValueError: none of the images can be decoded.
    """
    images, numbers = [], []
    for batch in EvalLoader(samples, size=size, batch=1, format=format).batches():
        name = samples.keys[int(batch.samples)]
        if not batch.readable:
            print(f"skipped, cannot be decoded: {name}", file=sys.stderr)
            continue
        images.append(computable(batch.images))
        numbers.append(int(batch.samples))
        if len(images) == count:
            break
    if not images:
        raise ValueError("none of the images can be decoded")
    return torch.cat(images), numbers


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.reconstruct",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", type=Path)
    parser.add_argument("images", metavar="IMAGES", type=Path, nargs="+")
    parser.add_argument("out", metavar="OUT.png", type=Path)
    parser.add_argument("--count", type=int, default=8, help="show only the first COUNT images (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the masks (default: 0)")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of the run's recipe; repeatable"
    )
    options = parser.parse_args(argv)

    def command() -> int:
        if options.out.suffix != ".png":
            raise ValueError(f"{options.out}: the last argument is the image to write, named *.png")
        if options.count < 1:
            raise ValueError(f"--count {options.count} must be at least 1")
        samples = load_images(*options.images)
        method, size, what = load_trained(options.run, options.set)
        images, numbers = read_images(samples, size, options.count, method.encoder.pixels.format)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        masks = draw_masks(method.mask_sampler(), options.seed, ((0, number) for number in numbers))
        indices = {name: index.to(device) for name, index in masks.items()}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        draw_reconstructions(method.to(device), images.to(device), indices, options.out, what)
        print(f"{options.out}: {len(images)} images, {what}")
        return 0

    return report_errors(command)


if __name__ == "__main__":
    sys.exit(main())
