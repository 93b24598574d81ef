"""LUT: the visible tokens learn the image's context (an add-on)."""

from typing import NamedTuple

from torch import Tensor


class Learned(NamedTuple):
    """What a method made of a batch."""

    loss: Tensor  # () of the images that were to be predicted
    seen: Tensor  # (B, V, D) encoded visible tokens of all images
    place: Tensor  # (B, V) the image's grid position of each
