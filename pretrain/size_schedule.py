"""A schedule of image sizes, usually smaller ones first: parses and checks it."""

import re
from itertools import pairwise
from typing import Annotated

from pydantic import Field, field_validator

from pretrain.trainer.data_config import DataConfig
from pretrain.trainer.schema import DEFAULT_AS_BEFORE

Size = tuple[int, int]  # height and width in pixels
_ENTRY = re.compile(r"(\d+):(\d+)(?:x(\d+))?")


def size_text(size: Size) -> str:
    """A size as written in a schedule: the side of a square, or height x width."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def parse_schedule(text: str) -> list[tuple[int, Size]]:
    """The epochs, and the size from each of them on; raises ValueError if the text is not a schedule."""
    entries = [_ENTRY.fullmatch(entry) for entry in re.split(r"[,\s]+", text.strip())]
    if not all(entries):
        raise ValueError(
            f"data.size_schedule={text}: write each size after the epoch it starts at, such as 0:128,60:192,180:224, "
            f"or 0:96x128 for a height and a width"
        )
    found = [(entry[1], entry[2], entry[3] or entry[2]) for entry in entries if entry]
    return [(int(epoch), (int(height), int(width))) for epoch, height, width in found]


class PretrainDataConfig(DataConfig):
    """Training shards, and the crops taken from their images."""

    size_schedule: Annotated[str | None, DEFAULT_AS_BEFORE] = Field(
        None, description="sizes and the epochs they start at, such as 0:128,60:192,180:224; the last is image_size"
    )

    @field_validator("size_schedule")
    @classmethod
    def _is_written_in_one_way(cls, text: str | None) -> str | None:
        if text is None:
            return None
        return ",".join(f"{epoch}:{size_text(size)}" for epoch, size in parse_schedule(text))

    @property
    def sizes(self) -> list[tuple[int, Size]]:
        """The epochs at which a size begins, and that size."""
        return parse_schedule(self.size_schedule) if self.size_schedule else [(0, self.height_width)]

    def schedule_problem(self, epochs: int) -> str | None:
        """What in the schedule does not fit the number of epochs or other keys of this section, if anything."""
        begins, (_, last) = [epoch for epoch, _ in self.sizes], self.sizes[-1]
        given = f"data.size_schedule={self.size_schedule}"
        if begins[0] != 0:
            return f"{given} does not start at epoch 0: put 0:{size_text(self.sizes[0][1])} first"
        if any(later <= earlier for earlier, later in pairwise(begins)):
            return f"{given}: the epochs must increase, as in 0:128,60:192,180:224"
        if last != self.height_width:
            own, wanted = (str(size[0] if size[0] == size[1] else [*size]) for size in (self.height_width, last))
            return (
                f"{given} ends with {size_text(last)}, but the encoder is built for data.image_size={own}: "
                f"end it with {begins[-1]}:{size_text(self.height_width)}, or set data.image_size={wanted}"
            )
        if begins[-1] >= epochs:
            return (
                f"{given} starts its last size at epoch {begins[-1]}, but train.epochs={epochs}: start it at epoch "
                f"{epochs * 7 // 8} or earlier"
            )
        if inside := next((epoch for epoch in begins if epoch % self.repeats), None):
            near = max(inside // self.repeats, 1) * self.repeats
            return (
                f"{given} changes the size at epoch {inside}, in the middle of a pass of data.repeats="
                f"{self.repeats} epochs: change it at epoch {near} or {near + self.repeats}"
            )
        return None
