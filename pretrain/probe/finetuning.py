"""A short fine-tuning of a copy of the encoder: what masked image models are made for, at a fraction of the length.

The recipe is fixed and follows no paper: AdamW with layer decay, crops and flips, a linear layer on the mean of the
patch tokens. Its accuracy is below that of a real fine-tuning, more so with fewer steps. With fewer than `ENOUGH_STEPS`
it shows how fast a head is learned, not how good the encoder is.

Shapes: B images of H x W pixels, C classes.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.draw import uniforms
from data.eval_loader import EvalLoader
from pretrain.models.features import image_features
from pretrain.models.vit import ViT
from pretrain.probe.fitting import draw_batches, fit, generator
from pretrain.trainer.optim import layers_above

BATCH = 64
PEAK_LR = 5e-4
LAYER_DECAY = 0.75
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
CROP_SCALE = (0.35, 1.0)  # of the image's area
METRICS = ("finetune_top1", "finetune_top5")
# Five epochs of the default 10,000 images are 780 steps. After 188 (four epochs of 3,030 images), an encoder was still
# behind its own frozen tokens: 9 % against the attentive probe's 22 %, on 101 classes.
ENOUGH_STEPS = 500

Images = dict[int, Tensor]  # by sample: (H, W, channels), on the CPU


class FinetunedEncoder(nn.Module):
    """A copy of an encoder, and a linear layer on the mean of its patch tokens.

    In eval mode: stochastic depth would draw from the process's generator.
    """

    def __init__(self, encoder: ViT, num_classes: int, norm_after_pool: bool):
        super().__init__()
        self.encoder = copy.deepcopy(encoder).eval()
        self.norm_after_pool = norm_after_pool
        self.weight = nn.Parameter(torch.zeros(num_classes, encoder.arch.dim))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """(B, H, W, channels) pixels, as for `image_features` -> (B, C) fp32 logits; computed in bf16 on a GPU."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
            mean = image_features(self.encoder, images, norm_after_pool=self.norm_after_pool)
        return F.linear(mean.float(), self.weight, self.bias)


def steps_per_epoch(images: int) -> int:
    """Optimizer steps in a pass over `images` images; at least one."""
    return max(images // BATCH, 1)


def layer_decay_groups(model: FinetunedEncoder) -> list[dict]:
    """A group per parameter, with `lr_scale` = `LAYER_DECAY` ** (blocks above it + 1), and 1 for norm and head."""
    depth, groups = len(model.encoder.blocks), []
    for name, parameter in model.named_parameters():
        above = layers_above(name.removeprefix("encoder."), depth) if name.startswith("encoder.") else 0
        decay = WEIGHT_DECAY if parameter.ndim > 1 else 0.0
        groups.append({"params": [parameter], "weight_decay": decay, "lr_scale": LAYER_DECAY**above})
    return groups


def crop_and_flip(images: Tensor, step: int, samples: np.ndarray) -> Tensor:
    """A random crop of each image, resized to the image's size and perhaps flipped, by step and sample alone.

    Args:
        images: (B, H, W, channels), of any dtype.
        step: of the optimizer.
        samples: int64 (B,), the images' sample numbers.

    Returns:
        (B, H, W, channels) fp32.
    """
    drawn = np.stack([uniforms(generator(step, sample), (4,)) for sample in samples.tolist()])
    low, high = CROP_SCALE
    side = np.sqrt(low + (high - low) * drawn[:, 0])  # of the crop, as a share of the image's
    center_x, center_y = ((1 - side) * (2 * drawn[:, axis] - 1) for axis in (1, 2))
    flip = np.where(drawn[:, 3] < 0.5, -1.0, 1.0)
    zero = np.zeros_like(side)
    theta = np.stack([side * flip, zero, center_x, zero, side, center_y], 1).reshape(-1, 2, 3)
    pixels = images.float().movedim(-1, 1)
    grid = F.affine_grid(torch.from_numpy(theta).to(pixels), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False).movedim(1, -1)


def finetune(
    encoder: ViT,
    images: Images,
    samples: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    loader: EvalLoader,
    *,
    epochs: int,
    norm_after_pool: bool,
    device: torch.device,
) -> FinetunedEncoder:
    """Fine-tunes a copy of the encoder; called by all ranks together, with the same weights on all of them.

    Args:
        encoder: on the device.
        images: of this rank's part of the samples.
        samples, labels, num_classes, loader: as for `fit_attentive_probe`.
        epochs: passes over the samples, each of at least one step.
        norm_after_pool: as for `image_features`.
        device: where to compute.

    Returns:
        The copy with its head, on the device.
    """
    model = FinetunedEncoder(encoder, num_classes, norm_after_pool).to(device)
    model.encoder.requires_grad_(True)
    steps = epochs * steps_per_epoch(len(samples))

    def losses(step: int, rows: np.ndarray) -> Tensor:
        batch = torch.stack([images[sample] for sample in rows.tolist()]).to(device)
        logits = model(crop_and_flip(batch, step, rows))
        truth = torch.from_numpy(labels[rows]).long().to(device)
        return F.cross_entropy(logits, truth, reduction="none", label_smoothing=LABEL_SMOOTHING)

    fit(
        layer_decay_groups(model),
        losses,
        draw_batches(samples, BATCH, steps),
        images.__contains__,
        steps=steps,
        peak_lr=PEAK_LR,
        at_once=min(BATCH, loader.batch),
        world_size=loader.world_size,
        description="short fine-tuning",
    )
    return model
