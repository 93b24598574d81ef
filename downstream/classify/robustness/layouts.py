"""What the published robustness sets look like: which folder is which ImageNet class.

`objectnet.json` has, for each of ObjectNet's 313 folders, the ImageNet classes that its authors take for right; for 200
of them none. `siscore.json` has the class of each of SI-Score's 61 folders. The synsets of ImageNet, ImageNet-A and -R
and the labels of ReaL come with timm.
"""

import json
import pkgutil
import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.image_folder import Samples

CLASSES = 1000  # ImageNet's
VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})$")

# Mean error of AlexNet over the five severities: Hendrycks and Dietterich, Benchmarking Neural Network Robustness to
# Common Corruptions and Perturbations, ICLR 2019, whose mCE divides by them; in the digits of their code.
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
SEVERITIES = ("1", "2", "3", "4", "5")

ClassMap = Mapping[str, Sequence[int]]  # a folder's name -> the ImageNet classes that are right


@lru_cache
def synsets() -> dict[str, int]:
    """ImageNet's WordNet ids, in its order -> their classes."""
    return {name: number for number, name in enumerate(_timm("imagenet_synsets.txt").split())}


def imagenet(which: str = "") -> ClassMap:
    """The folders of ImageNet, or of ImageNet-A or -R (`a`, `r`), which have 200 of its classes."""
    names = _timm(f"imagenet_{which}_synsets.txt").split() if which else list(synsets())
    return {name: [synsets()[name]] for name in names}


def numbered() -> ClassMap:
    """ImageNet-V2's folders: the classes' numbers."""
    return {str(number): [number] for number in range(CLASSES)}


def objectnet() -> ClassMap:
    found: ClassMap = json.loads((Path(__file__).parent / "objectnet.json").read_text())
    return found


def si_score() -> ClassMap:
    return {name: [number] for name, number in json.loads((Path(__file__).parent / "siscore.json").read_text()).items()}


def real_labels() -> list[list[int]]:
    """ReaL's (Beyer et al. 2020): what is right for each image of ImageNet's validation set; nothing for some."""
    found: list[list[int]] = json.loads(_timm("imagenet_real_labels.json"))
    return found


def _timm(name: str) -> str:
    data: Any = pkgutil.get_data("timm.data", f"_info/{name}")
    return str(data.decode())


def check_folders(found: Collection[str], classes: ClassMap, where: Any, needed: Collection[str] | None = None) -> None:
    """Raises ValueError where folders are not those of the class map.

    Args:
        found: names of folders.
        classes: the map; folders that are not in it are refused.
        where: they are, for the message.
        needed: those that must be there, all of the map unless given.
    """
    if unknown := sorted(set(found) - set(classes)):
        raise ValueError(
            f"{where}: the folder '{unknown[0]}' ({len(unknown)} such) is none of this set's {len(classes)} classes, "
            f"which are called like '{next(iter(classes))}': is it another set, or another level of its folders?"
        )
    needed = set(classes if needed is None else needed)
    if missing := sorted(needed - set(found)):
        raise ValueError(
            f"{where}: {len(missing)} of this set's {len(needed)} classes are missing, for example '{missing[0]}': "
            f"unpack all of it"
        )


def right_classes(samples: Samples, classes: ClassMap, needed: Collection[str] | None = None) -> Tensor:
    """(N, 1000) bool: the ImageNet classes that are right for each sample.

    Shards without names of classes are taken to be labelled by ImageNet's own numbers.

    Raises:
        ValueError: as `check_folders`, or samples without labels.
    """
    if not samples.classes:
        if len(samples) and samples.label.min() >= 0 and samples.label.max() < CLASSES and len(classes) == CLASSES:
            return _table([[number] for number in range(CLASSES)])[torch.from_numpy(samples.label).long()]
        raise ValueError(
            f"{samples.root}: has no class folders called like '{next(iter(classes))}', and no classes.txt"
        )
    check_folders(samples.classes, classes, samples.root, needed)
    return _table([classes[name] for name in samples.classes])[torch.from_numpy(samples.label).long()]


def right_by_real(samples: Samples) -> Tensor:
    """(N, 1000) bool: ReaL's labels of images of the validation set, found by their names."""
    labels = real_labels()
    numbers = np.empty(len(samples), np.int64)
    for sample, key in enumerate(samples.keys):
        found = VAL_NAME.search(key)
        if found is None or not 1 <= int(found[1]) <= len(labels):
            raise ValueError(
                f"{samples.root}: '{key}' is not called like ILSVRC2012_val_00000001, by which ReaL's labels are given"
            )
        numbers[sample] = int(found[1]) - 1
    if len(set(numbers.tolist())) < len(numbers):
        raise ValueError(f"{samples.root}: an image of the validation set is there twice")
    return _table([labels[number] for number in numbers.tolist()])


def _table(classes: Sequence[Sequence[int]]) -> Tensor:
    table = torch.zeros(len(classes), CLASSES, dtype=torch.bool)
    for row, numbers in enumerate(classes):
        table[row, list(numbers)] = True
    return table
