"""A timm Vision Transformer as a classifier of the step loop: from uint8 images and labels to a loss, or to logits."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from downstream.checkpoints.files import read_source
from downstream.checkpoints.formats import translate
from downstream.checkpoints.timm_models import LoMaRViT
from downstream.checkpoints.weights import fill_encoder
from downstream.classify.config import AugmentConfig, FinetuneConfig
from pretrain.models.heads import SyncBatchNorm
from pretrain.models.patches import normalize_pixels
from pretrain.models.vit import ARCHS, ViT


class Classifier(nn.Module):
    """The model and what is done to its images and labels while it trains.

    All randomness is drawn from the process's generators, which the step loop seeds before each micro-batch.
    """

    def __init__(self, vit: Any, classes: int, augment: AugmentConfig):
        super().__init__()
        self.vit, self.augment = vit, augment
        self.mixup = None
        if augment.mixes:
            self.mixup = Mixup(
                augment.mixup, augment.cutmix, label_smoothing=augment.label_smoothing, num_classes=classes
            )

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """(B, H, W, 3) uint8 images -> the `loss` for labels (B,); without labels their `logits` (B, C)."""
        pixels = normalize_pixels(images).permute(0, 3, 1, 2)
        if labels is None:
            return {"logits": self.vit(pixels).float()}
        target, smoothing = labels, self.augment.label_smoothing
        if self.augment.random_erasing:
            pixels = RandomErasing(self.augment.random_erasing, mode="pixel", device=pixels.device)(pixels)
        if self.mixup:
            pixels, target = self.mixup(pixels, target)
            smoothing = 0.0  # it is in the mixed targets
        return {"loss": F.cross_entropy(self.vit(pixels).float(), target, label_smoothing=smoothing)}


def build_vit(
    arch: str, patch: int, size: tuple[int, int], position: str, classes: int, pool: str, **options: Any
) -> Any:
    """timm's model for an architecture of ours; `options` are timm's."""
    dim, depth, heads = ARCHS[arch]
    kind: Any = VisionTransformer if position == "sincos" else partial(LoMaRViT, position=position)
    shape = {"patch_size": patch, "img_size": size, "embed_dim": dim, "depth": depth, "num_heads": heads}
    return kind(**shape, num_classes=classes, global_pool=pool, **options)


@dataclass(frozen=True)
class _Start:
    """What a checkpoint gave beside the encoder's weights.

    Attributes:
        report: what became of its keys, in words.
        pool_norm: whether the encoder's last norm is that of a classifier's pool.
        head: its weight and bias, where it tells the same classes apart.
    """

    report: str = "from scratch"
    pool_norm: bool = False
    head: dict[str, Tensor] = field(default_factory=dict)


def build_classifier(
    config: FinetuneConfig, names: Sequence[str] = (), load_start: bool = True
) -> tuple[Classifier, str]:
    """The classifier, initialised from the seed and `start.checkpoint` alone: the same weights on every rank.

    Args:
        config: the run's.
        names: of the classes, in order; a start that is a classifier of the same ones keeps its head.
        load_start: not needed where a checkpoint of the run itself is loaded afterwards.

    Returns:
        The classifier, and what became of the start's keys, in words.

    Raises:
        ValueError: the start is of another architecture, patch or kind of position, damaged, or not understood.
    """
    torch.manual_seed(config.seed)
    model, start, head = config.model, config.start, config.head
    kind = {"relative": model.position == "relative", "bias": model.position == "bias"}
    encoder = ViT(model.arch, model.patch_size, config.grid, **kind)
    # A pool behind the encoder gets a norm of its own, as in MAE's and LoMaR's fine-tuning, unless nothing below would
    # learn to work with that: a frozen encoder keeps its norm.
    own_norm = head.pool == "avg" and start.trained_blocks is None
    started = _load_start(encoder, config, own_norm, names) if start.checkpoint and load_start else _Start()
    vit = build_vit(
        model.arch,
        model.patch_size,
        config.data.height_width,
        model.position,
        head.num_classes,
        head.pool,
        fc_norm=own_norm,
        drop_path_rate=model.drop_path_rate,
    )
    _fill(vit, encoder, own_norm, started.pool_norm)
    if model.grad_checkpointing:
        vit.set_grad_checkpointing()
    # MAE's deviations: a head that starts at nearly nothing leaves what was pretrained alone in the first steps.
    nn.init.trunc_normal_(vit.head.weight, std=0.01 if start.trained_blocks == 0 else 2e-5)
    if started.head:
        vit.head.load_state_dict(started.head)
    if head.kind == "batchnorm":
        vit.head = nn.Sequential(SyncBatchNorm(vit.embed_dim, eps=1e-6, affine=False), vit.head)
    _freeze(vit, start.trained_blocks)
    return Classifier(vit, head.num_classes, config.augment), started.report


def _load_start(encoder: ViT, config: FinetuneConfig, own_norm: bool, names: Sequence[str]) -> _Start:
    """Fills the encoder; raises ValueError as `build_classifier`."""
    start = config.start
    assert start.checkpoint
    try:
        source = read_source(start.checkpoint, start.weights)
    except ValueError as error:
        raise ValueError(f"start.checkpoint: {error}") from None
    tensors = dict(source.tensors)
    pool_norm = own_norm and "fc_norm.weight" in tensors and "norm.weight" not in tensors
    if pool_norm:  # in the place of the encoder's last norm, which nothing else here would use
        tensors |= {f"norm.{kind}": tensors.pop(f"fc_norm.{kind}") for kind in ("weight", "bias")}
    try:
        report = fill_encoder(encoder, translate(replace(source, tensors=tensors)))
    except ValueError as error:
        raise ValueError(f"start.checkpoint: {error}; set model.* to what it is, or give another") from None
    kept = {}
    if config.head.kind == "linear" and source.metadata.get("names") == json.dumps(list(names)):
        kept = {kind: tensors[f"head.{kind}"] for kind in ("weight", "bias")}
        for name in ("head.weight", "head.bias"):
            del report.dropped[name]
            report.used[name] = (name,)
    return _Start(str(report), pool_norm, kept)


def _fill(vit: Any, encoder: ViT, own_norm: bool, pool_norm: bool) -> None:
    """The encoder's weights, all of them; where the pool has a norm its last norm goes there, or nowhere."""
    state = encoder.state_dict()
    if own_norm:
        norm = {kind: state.pop(f"norm.{kind}") for kind in ("weight", "bias")}
        if pool_norm:
            state |= {f"fc_norm.{kind}": tensor for kind, tensor in norm.items()}
    missing, unexpected = vit.load_state_dict(state, strict=False)
    fresh = {"head.weight", "head.bias"}
    if own_norm and not pool_norm:
        fresh |= {"fc_norm.weight", "fc_norm.bias"}
    assert set(missing) == fresh, missing
    assert not unexpected, unexpected


def _freeze(vit: Any, trained_blocks: int | None) -> None:
    """All but the last blocks, the last norm and the head."""
    if trained_blocks is None:
        return
    blocks = list(vit.blocks)
    if trained_blocks > len(blocks):
        raise ValueError(f"start.trained_blocks={trained_blocks}: there are {len(blocks)} blocks")
    vit.requires_grad_(False)
    after = [vit.norm, vit.head] if trained_blocks else [vit.head]
    for module in blocks[len(blocks) - trained_blocks :] + after:
        module.requires_grad_(True)
