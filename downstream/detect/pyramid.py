"""ViTDet's simple feature pyramid: five maps from the backbone's last map."""

from collections.abc import Sequence

import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor, nn

# For `norm_cfg=dict(type="LN2d")` of heads: layer norm over the channels of (B, C, H, W).
MODELS.register_module(name="LN2d", module=LayerNorm2d)


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Maps at strides of 4, 8, 16, 32 and 64 pixels for patches of 16 pixels.

    Each scale has its own layers: transposed convolutions up or pooling down, then a 1x1 and a 3x3 convolution, each
    with a layer norm. The last map, for the region proposals, is the one before it, subsampled.

    Args:
        in_channels: of the backbone's map, a multiple of 4.
        out_channels: of all maps.
    """

    def __init__(self, in_channels: int, out_channels: int = 256):
        super().__init__()
        half, quarter = in_channels // 2, in_channels // 4
        up4: list[nn.Module] = [
            nn.ConvTranspose2d(in_channels, half, 2, 2),
            LayerNorm2d(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, 2),
        ]
        up2: list[nn.Module] = [nn.ConvTranspose2d(in_channels, half, 2, 2)]
        # ceil_mode keeps the last row and column of a map with odd sides.
        down2: list[nn.Module] = [nn.MaxPool2d(2, ceil_mode=True)]
        scales = [(up4, quarter), (up2, half), ([], in_channels), (down2, in_channels)]
        self.scales = nn.ModuleList(
            nn.Sequential(
                *resample,
                nn.Conv2d(channels, out_channels, 1, bias=False),
                LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm2d(out_channels),
            )
            for resample, channels in scales
        )

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The backbone's only map, (B, D, h, w), in a tuple -> (B, out_channels, ...) with 4h, 2h, h, h/2, h/4 rows.

        h/2 and h/4 are rounded up.
        """
        (last,) = maps
        # mmcv's RoIAlign assumes contiguous memory, which the output of LayerNorm2d does not have.
        pyramid = [scale(last).contiguous() for scale in self.scales]
        return (*pyramid, F.max_pool2d(pyramid[-1], 1, 2))
