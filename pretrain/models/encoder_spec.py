"""The description of an encoder, stored in the metadata of its file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.pixel_format import IMAGENET, Pixels
from data.transforms import height_width
from pretrain.models.vit import ARCHS, ViT


@dataclass(frozen=True)
class EncoderSpec:
    """All that is needed to rebuild an encoder and, if known, how it was trained.

    Attributes:
        arch: a name of `ARCHS`.
        patch_size: side of a patch in pixels.
        image_size: (height, width) in pixels.
        position: `relative`, `bias` or `sincos`; the last means any absolute table, even a learned one.
        method: of pretraining, if known.
        epochs: of pretraining, if known.
        class_token: whether there is one; only encoders from other projects (I-JEPA's) have none.
        registers: tokens between the class token and the patches.
        pixels: of its images.
    """

    arch: str
    patch_size: int
    image_size: tuple[int, int]
    position: str
    method: str | None = None
    epochs: int | None = None
    class_token: bool = True
    registers: int = 0
    pixels: Pixels = IMAGENET

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @classmethod
    def of(cls, encoder: ViT) -> "EncoderSpec":
        """The spec of an existing encoder."""
        arch = next(name for name, arch in ARCHS.items() if arch == encoder.arch)
        return cls(
            arch,
            encoder.patch_size,
            encoder.image_size,
            encoder.position,
            class_token=encoder.cls_token is not None,
            registers=encoder.registers,
            pixels=encoder.pixels,
        )

    def build(self) -> ViT:
        """A freshly initialized encoder."""
        relative, bias = self.position == "relative", self.position == "bias"
        return ViT(
            self.arch,
            self.patch_size,
            self.grid,
            relative,
            bias=bias,
            class_token=self.class_token,
            registers=self.registers,
            pixels=self.pixels,
        )

    def to_metadata(self) -> dict[str, str]:
        """The metadata of a safetensors file."""
        not_usual = self.pixels != IMAGENET
        optional = {
            "method": self.method,
            "epochs": self.epochs,
            "class_token": None if self.class_token else "false",
            "registers": self.registers or None,
            **({key: json.dumps(value) for key, value in self.pixels._asdict().items()} if not_usual else {}),
        }
        return {
            "arch": self.arch,
            "patch_size": str(self.patch_size),
            "image_size": f"{self.image_size[0]}x{self.image_size[1]}",
            "position": self.position,
            **{key: str(value) for key, value in optional.items() if value is not None},
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None) -> "EncoderSpec | None":
        """The spec in a file's metadata; None if it does not describe an encoder, as in files from other projects."""
        if not metadata or not metadata.keys() >= {"arch", "patch_size", "image_size", "position"}:
            return None
        height, width = map(int, metadata["image_size"].split("x"))
        epochs = metadata.get("epochs")
        return cls(
            metadata["arch"],
            int(metadata["patch_size"]),
            (height, width),
            metadata["position"],
            metadata.get("method"),
            int(epochs) if epochs is not None else None,
            metadata.get("class_token") != "false",
            int(metadata.get("registers", 0)),
            _read_pixels({key: json.loads(metadata[key]) for key in Pixels._fields if key in metadata}),
        )

    @classmethod
    def from_signature(cls, signature: Mapping[str, Any], epochs: int | None = None) -> "EncoderSpec":
        """The spec of a pretraining run, from its resume signature. Raises KeyError if it is not one."""
        model, size = signature["model"], signature["data"]["image_size"]
        height, width = height_width(size)
        method, registers = signature["method"]["name"], model.get("registers", 0)
        position = "sincos" if model["position"] == "learned" else model["position"]
        size = (height, width)
        pixels = _read_pixels(signature["data"])
        return cls(
            model["arch"], model["patch_size"], size, position, method, epochs, registers=registers, pixels=pixels
        )


def _read_pixels(record: Mapping[str, Any]) -> Pixels:
    """The pixels of a record with `mean`, `std` and `dtype`; what it lacks is ImageNet's."""
    mean, std = (tuple(record.get(key) or getattr(IMAGENET, key)) for key in ("mean", "std"))
    return Pixels(mean, std, record.get("dtype", IMAGENET.dtype))
