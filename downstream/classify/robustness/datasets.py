"""The published robustness sets: their folders, and the ImageNet classes that are correct for each.

`objectnet.json` has the ImageNet classes that ObjectNet's authors accept for each of its 313 folders; 200 folders have
none. `siscore.json` has the class of each of SI-Score's 61 folders. The synsets of ImageNet, ImageNet-A and -R and the
labels of ReaL come with timm.
"""

import functools
import json
import pkgutil
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.image_folder import Samples

NUM_CLASSES = 1000  # of ImageNet
VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})$")

# AlexNet's mean errors over the five severities, which the mCE divides by, with the digits of the authors' code:
# Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, ICLR 2019.
ALEXNET_ERRORS = {
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
# Corruptions that are published along with the mCE's 15, but that the mCE does not count.
EXTRA_CORRUPTIONS = {"speckle_noise", "gaussian_blur", "spatter", "saturate"}

OBJECTNET_BORDER = 2  # red pixels around each image
OUTLIER_CLASSES = 200  # of ImageNet-O

ClassMap = Mapping[str, Sequence[int]]  # name of a folder -> the correct ImageNet classes for its images


@lru_cache
def synsets() -> dict[str, int]:
    """ImageNet's WordNet ids -> their labels, in label order."""
    return {name: label for label, name in enumerate(_read_timm("imagenet_synsets.txt").split())}


def imagenet(subset: str = "") -> ClassMap:
    """The folders of ImageNet, or of ImageNet-A or -R (`a`, `r`), which have 200 of its classes."""
    names = _read_timm(f"imagenet_{subset}_synsets.txt").split() if subset else list(synsets())
    return {name: [synsets()[name]] for name in names}


def imagenet_v2() -> ClassMap:
    """The folders of ImageNet-V2, which are named by label."""
    return {str(label): [label] for label in range(NUM_CLASSES)}


def objectnet() -> ClassMap:
    """The 313 folders of ObjectNet; those outside ImageNet's classes have no correct class."""
    found: ClassMap = json.loads((Path(__file__).parent / "objectnet.json").read_text())
    return found


def si_score() -> ClassMap:
    """The 61 folders of SI-Score."""
    labels = json.loads((Path(__file__).parent / "siscore.json").read_text())
    return {name: [label] for name, label in labels.items()}


# The sets that consist of class folders and need nothing else.
CLASS_MAPS: dict[str, Callable[[], ClassMap]] = {
    "val": imagenet,
    "occlusion": imagenet,
    "v2": imagenet_v2,
    "a": functools.partial(imagenet, "a"),
    "r": functools.partial(imagenet, "r"),
    "sketch": imagenet,
    **dict.fromkeys(("si_size", "si_location", "si_rotation"), si_score),
}


def real_labels() -> list[list[int]]:
    """ReaL's labels (Beyer et al. 2020): the correct classes of each ImageNet validation image; some have none."""
    found: list[list[int]] = json.loads(_read_timm("imagenet_real_labels.json"))
    return found


def _read_timm(name: str) -> str:
    """One of timm's text files about ImageNet."""
    content = pkgutil.get_data("timm.data", f"_info/{name}")
    assert content is not None
    return content.decode()


def check_folders(
    found: Collection[str], classes: ClassMap, where: object, needed: Collection[str] | None = None
) -> None:
    """Raises ValueError if the folders do not match the class map.

    Args:
        found: names of folders.
        classes: the map; folders that are not in it are refused.
        where: their parent folder, for the message.
        needed: the folders that must exist; by default, all of the map.
    """
    if unknown := sorted(set(found) - set(classes)):
        raise ValueError(
            f"{where}: {len(unknown)} folders, for example '{unknown[0]}', are not among this set's {len(classes)} "
            f"classes, named like '{next(iter(classes))}': is it another set, or another level of its folders?"
        )
    needed = set(classes if needed is None else needed)
    if missing := sorted(needed - set(found)):
        raise ValueError(
            f"{where}: {len(missing)} of this set's {len(needed)} classes are missing, for example '{missing[0]}': "
            f"unpack all of it"
        )


def right_classes(samples: Samples, classes: ClassMap, needed: Collection[str] | None = None) -> Tensor:
    """(N, 1000) bool: the correct ImageNet classes of each sample.

    The labels of shards without class names are assumed to be ImageNet's.

    Raises:
        ValueError: as in `check_folders`, or samples without labels.
    """
    if not samples.classes:
        label = samples.label
        if len(samples) and label.min() >= 0 and label.max() < NUM_CLASSES and len(classes) == NUM_CLASSES:
            return _table([[number] for number in range(NUM_CLASSES)])[torch.tensor(label).long()]
        raise ValueError(
            f"{samples.root}: has no class folders with names like '{next(iter(classes))}', and no classes.txt"
        )
    check_folders(samples.classes, classes, samples.root, needed)
    return _table([classes[name] for name in samples.classes])[torch.tensor(samples.label).long()]


def right_by_real(samples: Samples) -> Tensor:
    """(N, 1000) bool: ReaL's labels of validation images, looked up by file name."""
    labels = real_labels()
    numbers = np.empty(len(samples), np.int64)
    for sample, key in enumerate(samples.keys):
        found = VAL_NAME.search(key)
        if found is None or not 1 <= int(found[1]) <= len(labels):
            raise ValueError(
                f"{samples.root}: '{key}' is not named ILSVRC2012_val_00000001 to {len(labels):08d}, which ReaL's "
                f"labels are looked up by"
            )
        numbers[sample] = int(found[1]) - 1
    if len(set(numbers.tolist())) < len(numbers):
        raise ValueError(f"{samples.root}: a validation image appears twice")
    return _table([labels[number] for number in numbers.tolist()])


def _table(classes: Sequence[Sequence[int]]) -> Tensor:
    """(len(classes), 1000) bool, true at the given classes of each row."""
    table = torch.zeros(len(classes), NUM_CLASSES, dtype=torch.bool)
    for row, numbers in enumerate(classes):
        table[row, list(numbers)] = True
    return table
