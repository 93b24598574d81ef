"""mmdet's COCO metric, for annotation files as various tools write them."""

from typing import Any

from mmdet.evaluation.metrics import CocoMetric
from mmdet.registry import METRICS


@METRICS.register_module()
class AnyIdsCocoMetric(CocoMetric):
    """COCO's box and mask AP, with any annotation ids.

    pycocotools marks a matched detection with the id of its annotation, so an annotation with id 0 counts as never
    found, and text ids fail after the first epoch. Here annotations are numbered from 1. A missing `iscrowd` means 0.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self._coco_api is not None:
            for number, annotation in enumerate(self._coco_api.dataset["annotations"], 1):
                annotation["id"] = number
                annotation.setdefault("iscrowd", 0)
            self._coco_api.createIndex()
