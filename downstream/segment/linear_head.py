"""A linear head for evaluating the features of a frozen encoder."""

from collections.abc import Sequence
from typing import Any

from mmcv.cnn import build_norm_layer
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class LinearHead(BaseDecodeHead):
    """A norm and a 1x1 convolution on one map; logits are resized to the image as for any head.

    Args:
        in_channels: of the map.
        norm_cfg: of the norm.
        others: further arguments of mmseg's heads.
    """

    def __init__(self, in_channels: int, norm_cfg: dict[str, Any], **others: Any):
        super().__init__(in_channels=in_channels, channels=in_channels, norm_cfg=norm_cfg, dropout_ratio=0.0, **others)
        self.norm = build_norm_layer(norm_cfg, in_channels)[1]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, D, h, w) maps -> (B, classes, h, w) logits from the map at `in_index`."""
        return self.cls_seg(self.norm(self._transform_inputs(maps)))
