"""mmdet's COCO metric for annotation files as tools write them."""

from typing import Any

from mmdet.evaluation.metrics import CocoMetric
from mmdet.registry import METRICS


@METRICS.register_module()
class AnyIdsCocoMetric(CocoMetric):
    """COCO's box and mask AP, whatever the ids of the annotations are.

    pycocotools marks a detection as found by the id of its annotation: one with the id 0 counts as never found, and
    text is an error after the first epoch. So annotations are numbered from 1 here. One without `iscrowd` is no crowd.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self._coco_api is not None:
            for number, annotation in enumerate(self._coco_api.dataset["annotations"], 1):
                annotation["id"] = number
                annotation.setdefault("iscrowd", 0)
            self._coco_api.createIndex()
