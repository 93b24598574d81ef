"""Draws a method's predictions next to the truth, in labeled columns."""

from pathlib import Path

import torch
from torch import Tensor

from pretrain.methods.base import MaskIndices, Method
from pretrain.methods.lut import LUT
from pretrain.models.patches import ALONE, describe_shown
from pretrain.trainer.figures import draw_image_grid

# The name of an image in the result of `reconstruct` -> the title of its column; other names are titles themselves.
_TITLES = {
    "framed": "image",
    "masked": "what the model sees",
    ALONE: "prediction alone",
    "reconstruction": "both together",
    "original": "truth",
    "window": "truth",
}


def drawn_method(method: Method | LUT) -> Method:
    """The method whose predictions are drawn: for LUT the wrapped one, since LUT's own are not images."""
    return method.method if isinstance(method, LUT) else method


@torch.no_grad()
def draw_reconstructions(
    method: Method, images: Tensor, mask_indices: MaskIndices, path: Path, heading: str, caption: str = ""
) -> None:
    """Draws one row per image, the truth last.

    Args:
        method: in eval mode; for LUT, its `drawn_method`.
        images: (B, H, W, C), uint8 or `computable`, on the method's device like the indices.
        mask_indices: from its mask sampler.
        path: of the PNG.
        heading: says which model's predictions these are.
        caption: follows that of the target.
    """
    shown = method.reconstruct(images, mask_indices)
    columns = {title: column.cpu() for title, column in _columns(shown, bool(method.target.caption)).items()}
    caption = f"{caption} {describe_shown(method.encoder.pixels)}".strip()
    if method.target.caption:
        caption = f"* {method.target.caption} {caption}"
    draw_image_grid(columns, path, heading, caption)


def _columns(shown: dict[str, Tensor], has_note: bool) -> dict[str, Tensor]:
    """The images by the titles of their columns: the whole image before the predicted window, the truth last.

    The column that a note refers to has a star.
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
