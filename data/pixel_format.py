"""How many channels a pixel has, of which type its values are, and their statistics; a batch has one format."""

import argparse
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

DType = Literal["uint8", "uint16", "float32"]
MAX_CHANNELS = 16
_WHITE = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}


class PixelFormat(NamedTuple):
    """Of images as they are read and handed over: nothing is cut down from one format to another.

    Attributes:
        channels: of a pixel, C.
        dtype: NumPy's name of its values' type.
    """

    channels: int = 3
    dtype: DType = "uint8"

    @property
    def white(self) -> float:
        """What values are divided by: 255, 65535, or 1."""
        return _WHITE[self.dtype]

    def check(self) -> None:
        """Raises ValueError for a number of channels that images do not have."""
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise ValueError(f"--channels {self.channels}: images have from 1 to {MAX_CHANNELS}")

    def __str__(self) -> str:
        return f"{self.channels} channel{'s' if self.channels > 1 else ''} of {self.dtype}"


RGB = PixelFormat()


class Pixels(NamedTuple):
    """What a model takes pixels to be; by default ImageNet's RGB.

    Attributes:
        mean, std: of each channel, of values divided by the format's `white`: in 0..1, but for float32.
        dtype: of the values.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    dtype: DType = "uint8"

    @property
    def channels(self) -> int:
        """C."""
        return len(self.mean)

    @property
    def format(self) -> PixelFormat:
        """Of the images."""
        return PixelFormat(self.channels, self.dtype)

    def __str__(self) -> str:
        mean, std = ("/".join(f"{x:g}" for x in values) for values in (self.mean, self.std))
        return f"mean {mean}, deviation {std}" + ("" if self.format == RGB else f", {self.format}")


IMAGENET = Pixels()


def empty_images(*shape: int, format: PixelFormat = RGB) -> Tensor:
    """Images (*shape, C) on the CPU, to be written into."""
    return torch.empty((*shape, format.channels), dtype=getattr(torch, format.dtype))


def computable(images: Tensor) -> Tensor:
    """uint16 as float32, which has all of its values: torch moves tensors of uint16 and does little else with them."""
    return images.float() if images.dtype == torch.uint16 else images


def add_format(parser: argparse.ArgumentParser) -> None:
    """The options --channels and --dtype of a command, which `given_format` reads."""
    parser.add_argument("--channels", type=int, metavar="C", help="of every image, as data.channels (default: 3)")
    parser.add_argument("--dtype", choices=get_args(DType), help="of their values, as data.dtype (default: uint8)")


def given_format(options: argparse.Namespace) -> PixelFormat:
    """What --channels and --dtype say; raises ValueError for what cannot be."""
    format = PixelFormat(RGB.channels if options.channels is None else options.channels, options.dtype or RGB.dtype)
    format.check()
    return format
