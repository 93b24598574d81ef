"""Shrinking photographs while they are packed: ``python -m data.pack --short-side 288 --quality 90``."""

import json
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from data.image_facts import orientation_of
from data.image_file import MIN_SIDE, bad_image, to_rgb

PLAN_FILE = "pack.json"  # next to shards: how they were packed
_TO_UPRIGHT = {  # EXIF 2.3, table 4
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Shrink(NamedTuple):
    """How to shrink photographs whose short side is longer."""

    short_side: int  # in pixels
    quality: int  # of the JPEG that is written

    def check(self) -> None:
        """Raises ValueError for invalid settings."""
        if self.short_side < MIN_SIDE:
            raise ValueError(f"--short-side {self.short_side} must be at least {MIN_SIDE}: 288 suits training at 224")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality {self.quality} must be from 1 to 100: 90 is usual")

    def __str__(self) -> str:
        return f"photographs whose short side was over {self.short_side} pixels were shrunk to it, JPEG {self.quality}"


def shrink_image(image: Image.Image, shrink: Shrink) -> bytes | None:
    """Returns a JPEG with the wanted short side, turned upright as EXIF says; None if the image is not larger.

    The image was opened by ``open_image``; if it is already decoded, it is not decoded again.

    It is resized with an antialiased Lanczos filter. Transparency and metadata, color profiles included, are dropped:
    training reads none of them.

    Raises:
        BadImage: as in ``decode``.
    """
    times = shrink.short_side / min(image.size)
    if times >= 1:
        return None
    size = round(image.width * times), round(image.height * times)
    try:
        pixels = to_rgb(image).resize(size, Image.Resampling.LANCZOS)
        turn = _TO_UPRIGHT.get(orientation_of(image))
        upright = pixels if turn is None else pixels.transpose(turn)
        upright.info.clear()  # Pillow would write some of it
        file = BytesIO()
        upright.save(file, "JPEG", quality=shrink.quality, optimize=True)
    except Exception as error:  # a decoder fed with arbitrary bytes raises arbitrary errors
        raise bad_image(error) from error
    return file.getvalue()


def read_shrink(folder: Path) -> Shrink | None:
    """Reads how the photographs in a folder's shards were shrunk, which ``data.pack`` wrote next to them."""
    path = folder / PLAN_FILE
    plan = json.loads(path.read_text("utf-8") or "{}") if path.exists() else {}
    return Shrink(plan["short_side"], plan["quality"]) if "short_side" in plan else None
