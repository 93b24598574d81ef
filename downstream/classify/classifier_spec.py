"""What describes a classifier beyond its encoder, as written to and read from its file's metadata."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.models.encoder_spec import EncoderSpec


@dataclass(frozen=True)
class ClassifierSpec:
    """What is needed to rebuild a classifier.

    Attributes:
        encoder: the encoder it is built on.
        num_classes: outputs of its head.
        pool: `avg` (mean of the patch tokens) or `token` (the class token).
        class_names: in the order of the labels; empty if the training shards have none.
        multi_label: whether an image can have several classes or none; each output is then an independent decision.
    """

    encoder: EncoderSpec
    num_classes: int
    pool: str
    class_names: tuple[str, ...] = ()
    multi_label: bool = False

    def to_metadata(self) -> dict[str, str]:
        """The metadata of a safetensors file."""
        metadata = {**self.encoder.to_metadata(), "num_classes": str(self.num_classes), "pool": self.pool}
        if self.class_names:
            metadata["class_names"] = json.dumps(list(self.class_names))
        if self.multi_label:
            metadata["multi_label"] = "true"
        return metadata

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "ClassifierSpec | None":
        """None if the metadata does not describe a classifier."""
        encoder = EncoderSpec.from_metadata(metadata)
        if encoder is None or not metadata.keys() >= {"num_classes", "pool"}:
            return None
        names = tuple(json.loads(metadata.get("class_names", "[]")))
        multi_label = metadata.get("multi_label") == "true"
        return cls(encoder, int(metadata["num_classes"]), metadata["pool"], names, multi_label)
