"""Folders of the Hugging Face hub, transformers' and timm's: the files of weights, and the records next to them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
# Files of weights, in the order in which the libraries look for them.
_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_INDEX = ".index.json"


@dataclass(frozen=True)
class HubRecord:
    """What a folder says about its model.

    Attributes:
        config: from `config.json`.
        preprocessor: from `preprocessor_config.json`; empty if there is none.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    preprocessor: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model_type(self) -> str | None:
        """Transformers' name of the kind of model; None in timm's folders."""
        return self.config.get("model_type")

    @property
    def _timm(self) -> Mapping[str, Any]:
        return self.config.get("pretrained_cfg") or {}

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels."""
        size = self.config.get("image_size") or (self._timm.get("input_size") or [])[1:]
        if isinstance(size, int):
            return size, size
        return (int(size[0]), int(size[1])) if len(size) == 2 else None

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and deviation of the pixels, in 0..1."""
        if self.preprocessor.get("do_normalize") is False:
            return (0.0,) * 3, (1.0,) * 3
        mean = self.preprocessor.get("image_mean", self._timm.get("mean"))
        std = self.preprocessor.get("image_std", self._timm.get("std"))
        if mean is None or std is None:
            return None
        return _three(mean), _three(std)

    @property
    def pool(self) -> str | None:
        """timm's `global_pool` of a classifier, if the folder says."""
        pool = self.config.get("global_pool")
        return pool if pool in ("avg", "token") else None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in the order of the labels; empty if they are only numbers."""
        names = self.config.get("id2label") or {}
        ordered = [str(names[key]) for key in sorted(names, key=int)]
        if ordered == [f"LABEL_{label}" for label in range(len(ordered))]:
            ordered = []
        return tuple(ordered or self.config.get("label_names") or ())

    def problems(self, heads: int) -> list[str]:
        """Settings besides the weights that differ from those of our encoder with that many heads."""
        same = {"num_attention_heads": heads, "hidden_act": "gelu"}
        differing = [key for key, value in same.items() if self.config.get(key, value) != value]
        return [f"{key}={self.config[key]} (here: {same[key]})" for key in differing]


def read_record(folder: Path) -> HubRecord | None:
    """Reads the record of a folder; None if it is not one of the hub's.

    Raises:
        ValueError: one of its files is not a JSON object.
    """
    if not (folder / CONFIG).is_file():
        return None
    config = _read_json(folder / CONFIG)
    if not config.keys() & {"model_type", "architecture", "architectures"}:
        return None
    preprocessor = folder / PREPROCESSOR
    return HubRecord(config, _read_json(preprocessor) if preprocessor.is_file() else {})


def is_weights(path: Path) -> bool:
    """Whether a file is named like weights, or a part of them, in the hub's folders."""
    return path.name.startswith(("model", "pytorch_model")) and path.suffix in (".safetensors", ".bin", ".json")


def weight_files(folder: Path) -> list[Path]:
    """The files of weights: one, or the parts that an index names.

    Raises:
        ValueError: there are none, or one that the index names is missing or elsewhere.
    """
    found = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if found is None:
        raise ValueError(f"{folder} has a {CONFIG} but none of {', '.join(_FILES)}: copy or download all of it")
    if not found.name.endswith(_INDEX):
        return [found]
    names = sorted(set(map(str, (_read_json(found).get("weight_map") or {}).values())))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{found} names {name}, which is not in the folder: copy or download all of it")
    return [folder / name for name in names]


def _three(value: float | Sequence[float]) -> tuple[float, ...]:
    """A number for each channel; a record may give one for all."""
    return (float(value),) * 3 if isinstance(value, int | float) else tuple(map(float, value))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): copy or download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object: copy or download it again")
    return content
