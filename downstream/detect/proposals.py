"""Mask R-CNN's region proposals under bf16 autocast."""

from mmdet.models.dense_heads import RPNHead
from mmengine.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class FloatRPNHead(RPNHead):
    """mmdet's, with its predictions in fp32.

    It sorts proposals by the sigmoid of their logits, which in bf16 has 128 values above a half: many good ones would
    be equal. And mmcv's operators know no bf16.
    """

    def forward_single(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) -> objectness (B, anchors, h, w) and offsets (B, 4 anchors, h, w)."""
        objectness, offsets = super().forward_single(x)
        return objectness.float(), offsets.float()
