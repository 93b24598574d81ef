"""Draws what a method predicts of images, beside the truth, in columns that say what they are."""

from pathlib import Path

import torch
from torch import Tensor

from pretrain.methods.base import MaskIndices, Method
from pretrain.methods.lut import LUT
from pretrain.models.patches import ALONE, describe_shown
from pretrain.trainer.figures import draw_image_grid

# What the methods' `reconstruct` calls an image -> the title of its column; others are titled by their names.
_TITLES = {
    "framed": "image",
    "masked": "what the model sees",
    ALONE: "prediction alone",
    "reconstruction": "both together",
    "original": "truth",
    "window": "truth",
}


def drawn_method(method: Method | LUT) -> Method:
    """The method whose predictions are drawn: LUT's own ones are no images."""
    return method.method if isinstance(method, LUT) else method


@torch.no_grad()
def draw_reconstructions(
    method: Method, images: Tensor, mask_indices: MaskIndices, path: Path, heading: str, caption: str = ""
) -> None:
    """Draws a row for each image, the truth last.

    Args:
        method: in eval mode; of LUT's, `drawn_method`.
        images: (B, H, W, C), uint8 or `computable`, on the method's device, as the indices.
        mask_indices: of its mask sampler.
        path: of the PNG.
        heading: whose predictions of what these are.
        caption: added to that of the target.
    """
    shown = method.reconstruct(images, mask_indices)
    columns = {title: column.cpu() for title, column in _columns(shown, bool(method.target.caption)).items()}
    caption = f"{caption} {describe_shown(method.encoder.pixels)}".strip()
    if method.target.caption:
        caption = f"* {method.target.caption} {caption}"
    draw_image_grid(columns, path, heading, caption)


def _columns(shown: dict[str, Tensor], has_note: bool) -> dict[str, Tensor]:
    """The images by the titles of their columns, the whole image before the window that is predicted, the truth last.

    The column that a note is about has a star.
    """
    truth = "window" if "window" in shown else "original"
    others = [name for name in shown if name not in ("framed", "original", truth)]
    order = [*(["framed"] if "framed" in shown else []), *others, truth]
    titles = {name: _TITLES.get(name, name) for name in order}
    if "reconstruction" in shown and ALONE not in shown:  # an autoencoder sees all patches
        titles["reconstruction"] = "prediction"
    if has_note:
        noted = next(name for name in ("reconstruction", *others) if name in shown and name != "masked")
        titles[noted] += "*"
    return {titles[name]: shown[name] for name in order}
