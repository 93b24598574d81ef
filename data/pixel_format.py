"""The number of channels, the type and the statistics of pixels; a batch has one format."""

import argparse
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

DType = Literal["uint8", "uint16", "float32"]
MAX_CHANNELS = 16
_WHITE = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}


class PixelFormat(NamedTuple):
    """Format of images as they are read and passed on: none is reduced to another format.

    Attributes:
        channels: C, the number of channels.
        dtype: NumPy's name of the type of the values.
    """

    channels: int = 3
    dtype: DType = "uint8"

    @property
    def white(self) -> float:
        """What values are divided by: 255, 65535, or 1."""
        return _WHITE[self.dtype]

    def check(self) -> None:
        """Raises ValueError for an unsupported number of channels."""
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise ValueError(f"--channels {self.channels}: images have 1 to {MAX_CHANNELS}")

    def __str__(self) -> str:
        return f"{self.channels} channel{'s' if self.channels > 1 else ''} of {self.dtype}"


RGB = PixelFormat()


class Pixels(NamedTuple):
    """The pixels that a model expects; by default ImageNet's RGB.

    Attributes:
        mean, std: per channel, of values divided by the format's `white`: in 0..1, except for float32.
        dtype: of the values.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    dtype: DType = "uint8"

    @property
    def channels(self) -> int:
        """C, the number of channels."""
        return len(self.mean)

    @property
    def format(self) -> PixelFormat:
        """The format of the images."""
        return PixelFormat(self.channels, self.dtype)

    def __str__(self) -> str:
        mean, std = ("/".join(f"{x:g}" for x in values) for values in (self.mean, self.std))
        return f"mean {mean}, std {std}" + ("" if self.format == RGB else f", {self.format}")


IMAGENET = Pixels()


def empty_images(*shape: int, format: PixelFormat = RGB) -> Tensor:
    """Allocates images (*shape, C) on the CPU, to be written into."""
    return torch.empty((*shape, format.channels), dtype=getattr(torch, format.dtype))


def computable(images: Tensor) -> Tensor:
    """Converts uint16 to float32, which has all of its values: torch does little with uint16 tensors but move them."""
    return images.float() if images.dtype == torch.uint16 else images


def add_format(parser: argparse.ArgumentParser) -> None:
    """Adds the options --channels and --dtype to a command, for `given_format`."""
    parser.add_argument(
        "--channels", type=int, metavar="C", help="channels of every image, as data.channels (default: 3)"
    )
    parser.add_argument("--dtype", choices=get_args(DType), help="type of their values, as data.dtype (default: uint8)")


def given_format(options: argparse.Namespace) -> PixelFormat:
    """Returns the format that --channels and --dtype give; raises ValueError if it is not possible."""
    format = PixelFormat(RGB.channels if options.channels is None else options.channels, options.dtype or RGB.dtype)
    format.check()
    return format
