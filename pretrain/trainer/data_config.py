"""The section `data` of every training: shards, where they are kept, and the crops taken from their images."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, field_validator

from data.pixel_format import IMAGENET, MAX_CHANNELS, RGB, DType, Pixels
from data.storage.cache import DEFAULT_GB, CacheSettings
from data.storage.fetch import DEFAULT_TIMEOUT
from data.storage.location import is_url, parse_url
from data.transforms import height_width
from pretrain.trainer.schema import DEFAULT_AS_BEFORE, MAY_CHANGE, Section, Share


class DataConfig(Section):
    """Training shards, and the crops taken from their images."""

    shards: Annotated[str, MAY_CHANGE] = Field(
        min_length=1,
        description="a folder of tar shards, a tar file, or a brace pattern; also at s3://, gs://, hf://, https://",
    )
    accept_changed_shards: Annotated[bool, MAY_CHANGE] = Field(
        False, description="true: a run may continue with other shards, at the end of an epoch"
    )
    image_size: int | tuple[int, int] = Field(224, description="side in pixels, or [height, width]")
    crop: Literal["random", "simple"] = Field(
        "random", description="random: RandomResizedCrop; simple: DeiT III's, the short side resized, then cropped"
    )
    crop_scale: tuple[Share, Share] = Field((0.2, 1.0), description="range of the random crop's share of the area")
    hflip: Share = Field(0.5, description="probability of a horizontal flip")
    color_jitter: Share = Field(0.0, description="probability of changing brightness, contrast, saturation and hue")
    channels: Annotated[int, DEFAULT_AS_BEFORE] = Field(
        3,
        ge=1,
        le=MAX_CHANNELS,
        description="channels per pixel; images with another number are skipped, but gray ones become 3",
    )
    dtype: Annotated[DType, DEFAULT_AS_BEFORE] = Field(
        "uint8",
        description="type of the values in the files; images of another type are skipped, but for 3 "
        "channels of uint8 all photographs are converted",
    )
    mean: Annotated[tuple[float, ...] | None, DEFAULT_AS_BEFORE] = Field(
        None,
        description="mean per channel, divided by 255 for uint8 and 65535 for uint16; `python -m data.statistics` "
        "measures it; none: ImageNet's, for 3 channels of uint8",
    )
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...] | None, DEFAULT_AS_BEFORE] = Field(
        None, description="standard deviation per channel, likewise"
    )
    repeats: Annotated[int, DEFAULT_AS_BEFORE] = Field(
        1, ge=1, description="crops of each decoded image, next to each other in a batch; a pass takes as many epochs"
    )
    shuffle_shards: Annotated[int, DEFAULT_AS_BEFORE] = Field(
        0, ge=0, description="shuffle samples of this many shards together, as shards in a store need; 0: all samples"
    )
    cache_dir: Annotated[str, MAY_CHANGE] = Field(
        "",
        description="folder on a node's own disk where its processes keep shards of a store; empty: $SLURM_TMPDIR, "
        "or ~/.cache/lomar-deepspeed/shards",
    )
    cache_gb: Annotated[float, MAY_CHANGE] = Field(
        DEFAULT_GB, gt=0, description="limit for the shards there, in GB (1e9 bytes)"
    )
    fetch_timeout: Annotated[float, MAY_CHANGE] = Field(
        DEFAULT_TIMEOUT,
        gt=0,
        description="the run stops after this many seconds without data from a shard",
    )
    num_workers: Annotated[Annotated[int, Field(ge=0)] | Literal["auto"], MAY_CHANGE] = Field(
        "auto", description="decoding processes per rank; auto: one fewer than its share of the node's cores"
    )
    max_skipped_images: Annotated[Annotated[int, Field(ge=0)] | Share, MAY_CHANGE] = Field(
        1000, description="undecodable images that a rank may replace before the run stops, or a share such as 0.01"
    )

    @field_validator("shards")
    @classmethod
    def _without_credentials(cls, shards: str) -> str:
        if is_url(shards):
            parse_url(shards)
        return shards

    @property
    def height_width(self) -> tuple[int, int]:
        return height_width(self.image_size)

    @property
    def cache(self) -> CacheSettings:
        """Cache settings for shards in a store."""
        return CacheSettings(self.cache_dir, self.cache_gb, self.fetch_timeout)

    @property
    def pixels(self) -> Pixels:
        """Type and statistics of pixels; the statistics fit the number of channels if `problems` finds nothing."""
        return Pixels(self.mean or IMAGENET.mean, self.std or IMAGENET.std, self.dtype)

    def problems(self) -> Iterator[str]:
        """Channels, type and statistics that do not fit together."""
        format = f"data.channels={self.channels} data.dtype={self.dtype}"
        measure = f"`python -m data.statistics {self.shards} --channels {self.channels} --dtype {self.dtype}`"
        for key in ("mean", "std"):
            values = getattr(self, key)
            if values is None and (self.channels, self.dtype) != RGB:
                yield f"{format} needs data.{key} of these images: {measure} measures it"
            if values is not None and len(values) != self.channels:
                yield (
                    f"data.{key} has {len(values)} values, but data.channels={self.channels}: give one per channel; "
                    f"{measure} measures them"
                )
        if self.color_jitter and (self.channels, self.dtype) != RGB:
            yield f"data.color_jitter={self.color_jitter:g} {self.not_rgb}: set data.color_jitter=0"

    @property
    def not_rgb(self) -> str:
        """Why a color augmentation cannot be used unless images are 8-bit RGB; starts with the verb."""
        return f"works only on 8-bit RGB, but data.channels={self.channels} data.dtype={self.dtype} are set"
