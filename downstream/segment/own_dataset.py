"""Your own images and masks as an mmseg data set."""

import os
from collections.abc import Sequence
from typing import Any

from mmengine.fileio import list_dir_or_file, list_from_file
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from data.scan import IMAGE_EXTENSIONS


@DATASETS.register_module()
class OwnSegDataset(BaseSegDataset):
    """mmseg's data set of two folders, for images with any suffix and masks with any values.

    Args:
        img_suffix: of the images; None: all of `data.scan.IMAGE_EXTENSIONS`, in lower or upper case.
        mask_values: the value of each class in the masks, in the order of the classes; None: 0, 1, 2, ...
        args, kwargs: mmseg's.
    """

    def __init__(
        self, *args: Any, img_suffix: str | None = None, mask_values: Sequence[int] | None = None, **kwargs: Any
    ):
        self.mask_values = mask_values
        super().__init__(*args, img_suffix=img_suffix, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Like mmseg's method: a dictionary for each pair, in the order of the images' paths."""
        images, masks = self.data_prefix["img_path"], self.data_prefix["seg_map_path"]
        names = list_images(images, self.img_suffix, self.backend_args)
        stems = {strip_suffix(name, self.img_suffix): name for name in names}
        if self.ann_file:
            listed = {line.strip() for line in list_from_file(self.ann_file, backend_args=self.backend_args)}
            stems = {stem: name for stem, name in stems.items() if stem in listed}
        labels = None if self.mask_values is None else {value: label for label, value in enumerate(self.mask_values)}
        return [
            {
                "img_path": os.path.join(images, name),
                "seg_map_path": os.path.join(masks, stem + self.seg_map_suffix),
                "label_map": labels,
                "reduce_zero_label": self.reduce_zero_label,
                "seg_fields": [],
            }
            for stem, name in stems.items()
        ]


def list_images(folder: str, suffix: str | None, backend_args: dict[str, Any] | None = None) -> list[str]:
    """The sorted relative paths of all files below a folder with this suffix; None: with any image suffix."""
    suffixes = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
    found = list_dir_or_file(folder, list_dir=False, recursive=True, backend_args=backend_args)
    return sorted(
        name for name in found if (name.endswith(suffix) if suffix is not None else name.lower().endswith(suffixes))
    )


def strip_suffix(name: str, suffix: str | None) -> str:
    """The part of an image's name that its mask's name shares."""
    return name.removesuffix(suffix) if suffix else os.path.splitext(name)[0]
