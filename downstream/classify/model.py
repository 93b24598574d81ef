"""A timm Vision Transformer for the training loop: from uint8 images and labels to a loss, or to logits."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from data.pixel_format import IMAGENET, Pixels
from downstream.checkpoints.files import read_source
from downstream.checkpoints.formats import translate
from downstream.checkpoints.timm_models import build_vit, to_timm
from downstream.checkpoints.weights import fill_encoder
from downstream.classify.classifier_spec import ClassifierSpec
from downstream.classify.config import AugmentConfig, FinetuneConfig
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.heads import SyncBatchNorm
from pretrain.models.patches import normalize_pixels
from pretrain.models.vit import ViT


class Classifier(nn.Module):
    """The model, and the augmentation of its images and labels during training.

    All randomness is drawn from the process's generators, which the training loop seeds before each micro-batch.

    Args:
        vit: (B, C, H, W) standardized pixels -> (B, num_classes) logits.
        num_classes: the classes that mixed labels are spread over.
        augment: how training images and labels are augmented.
        pixels: of the images.
    """

    def __init__(self, vit: VisionTransformer, num_classes: int, augment: AugmentConfig, pixels: Pixels = IMAGENET):
        super().__init__()
        self.vit, self.augment, self.pixels = vit, augment, pixels
        self.num_classes = num_classes

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """(B, H, W, C) images of `pixels` -> the `loss` if labels are given, otherwise the `logits` (B, C).

        Args:
            images: augmented only if labels are given.
            labels: int64 (B,), one class per image, for cross entropy; or float (B, C) of 0 and 1, any number of
                classes per image, for binary cross entropy averaged over images and classes.
        """
        pixels = normalize_pixels(images, self.pixels).permute(0, 3, 1, 2)
        if labels is None:
            return {"logits": self.vit(pixels).float()}
        if self.augment.random_erasing:
            pixels = RandomErasing(self.augment.random_erasing, mode="pixel", device=pixels.device)(pixels)
        if labels.ndim == 2:
            return {"loss": self._binary_loss(pixels, labels)}
        target, smoothing = labels, self.augment.label_smoothing
        if self.augment.mixes:
            mixup = Mixup(
                self.augment.mixup, self.augment.cutmix, label_smoothing=smoothing, num_classes=self.num_classes
            )
            pixels, target = mixup(pixels, target)
            smoothing = 0.0  # the mixed targets are already smoothed
        return {"loss": F.cross_entropy(self.vit(pixels).float(), target, label_smoothing=smoothing)}

    def _binary_loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """The loss for lists of labels; those of two mixed images are mixed in the same shares as their pixels."""
        if self.augment.mixes:
            # timm mixes class indices. Giving each image its own class reveals the shares.
            mixup = Mixup(self.augment.mixup, self.augment.cutmix, label_smoothing=0.0, num_classes=len(labels))
            pixels, mixed = mixup(pixels, torch.arange(len(labels), device=labels.device))
            share = mixed.diagonal()[:, None]
            labels = share * labels + (1 - share) * labels.flip(0)
        smoothing = self.augment.label_smoothing
        target = labels * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(self.vit(pixels).float(), target)


@dataclass(frozen=True)
class _Start:
    """What a checkpoint provided besides the encoder's weights.

    Attributes:
        report: what happened to its keys, in words.
        pool_norm: whether the encoder's last norm came from behind a classifier's pool.
        head: weight and bias of its head, if that is for the same classes.
    """

    report: str = "from scratch"
    pool_norm: bool = False
    head: dict[str, Tensor] = field(default_factory=dict)


def build_classifier(
    config: FinetuneConfig, class_names: Sequence[str] = (), load_start: bool = True
) -> tuple[Classifier, str]:
    """The classifier. Its weights depend only on the seed and `start.checkpoint`, so they are equal on every rank.

    Args:
        config: the run's.
        class_names: in the order of the labels; a start that is a classifier of the same classes keeps its head.
        load_start: false if a checkpoint of the run itself is loaded afterwards, which makes the start unnecessary.

    Returns:
        The classifier, and what happened to the start's keys, in words.

    Raises:
        ValueError: the start differs in architecture, patch size or kind of position, is damaged, or has unknown keys.
    """
    torch.manual_seed(config.seed)
    model, start, head = config.model, config.start, config.head
    assert head.num_classes is not None
    spec, own_norm = encoder_spec(config), _has_own_norm(config)
    encoder = spec.build()
    _check_blocks(config, len(encoder.blocks))
    started = _load_start(encoder, config, class_names) if start.checkpoint and load_start else _Start()
    vit = build_vit(spec, head.num_classes, head.pool, fc_norm=own_norm, drop_path_rate=model.drop_path_rate)
    _fill(vit, encoder, own_norm, started.pool_norm)
    if model.grad_checkpointing:
        vit.set_grad_checkpointing()
    # MAE's standard deviations: a head that starts near zero hardly changes the pretrained weights in the first steps.
    nn.init.trunc_normal_(vit.head.weight, std=0.01 if start.trained_blocks == 0 else 2e-5)
    if started.head:
        vit.head.load_state_dict(started.head)
    if head.kind == "batchnorm":
        vit.head = nn.Sequential(SyncBatchNorm(vit.embed_dim, eps=1e-6, affine=False), vit.head)
    _freeze(vit, start.trained_blocks)
    return Classifier(vit, head.num_classes, config.augment, spec.pixels), started.report


def check_start(config: FinetuneConfig) -> None:
    """Raises ValueError like `build_classifier` if the start does not fit; needs no data and creates no weights."""
    if config.start.checkpoint is None:
        return
    with torch.device("meta"):
        encoder = encoder_spec(config).build()
    _check_blocks(config, len(encoder.blocks))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")  # nothing needs to be copied
        _load_start(encoder, config, ())


def encoder_spec(config: FinetuneConfig) -> EncoderSpec:
    """The encoder that the classifier is built on."""
    model, data = config.model, config.data
    registers, pixels = model.registers, data.pixels
    return EncoderSpec(
        model.arch, model.patch_size, data.height_width, model.position, registers=registers, pixels=pixels
    )


def _has_own_norm(config: FinetuneConfig) -> bool:
    """Whether a norm after the pool replaces the encoder's last one, as in MAE's and LoMaR's fine-tuning.

    A frozen encoder keeps its norm: nothing below the pool could adapt to a new one.
    """
    return config.head.pool == "avg" and config.start.trained_blocks is None


def _load_start(encoder: ViT, config: FinetuneConfig, class_names: Sequence[str]) -> _Start:
    """Fills the encoder from `start.checkpoint`; raises ValueError like `build_classifier`."""
    start = config.start
    assert start.checkpoint
    try:
        source = read_source(start.checkpoint, start.weights)
    except ValueError as error:
        raise ValueError(f"start.checkpoint: {error}") from None
    advice = "use another checkpoint"
    try:
        found = translate(source)
        advice = _how_to_match(found.spec, config)
        report = fill_encoder(encoder, found)
    except ValueError as error:
        raise ValueError(f"start.checkpoint: {error}; {advice}") from None
    if found.pool_norm and not _has_own_norm(config):
        raise ValueError(
            f"start.checkpoint: {source.path} has a norm that was trained after average pooling: train everything, "
            f"with head.pool=avg and without start.trained_blocks, or start from the encoder that it came from"
        )
    if found.pool_norm:  # it goes back behind the pool
        for kind in ("weight", "bias"):
            del report.folded[f"norm.{kind}"]
    kept = {}
    spec = ClassifierSpec.from_metadata(source.metadata)
    same_classes = spec is not None and spec.class_names == tuple(class_names) != ()
    if config.head.kind == "linear" and same_classes:
        kept = {kind: found.head[f"head.{kind}"] for kind in ("weight", "bias")}
        for name in ("head.weight", "head.bias"):
            del report.dropped[name]
            report.used[name] = (name,)
    return _Start(str(report), found.pool_norm, kept)


def _how_to_match(found: EncoderSpec, config: FinetuneConfig) -> str:
    """Advice naming the keys that make the model match a start."""
    theirs, ours = (
        {name: getattr(record, name) for name in ("arch", "position", "patch_size", "registers")}
        for record in (found, config.model)
    )
    keys = [f"model.{name}={value}" for name, value in theirs.items() if value != ours[name]]
    return f"set {' '.join(keys)}" if keys else "use another checkpoint"


def _check_blocks(config: FinetuneConfig, depth: int) -> None:
    if (config.start.trained_blocks or 0) > depth:
        raise ValueError(f"start.trained_blocks={config.start.trained_blocks}: the encoder has {depth} blocks")


def _fill(vit: VisionTransformer, encoder: ViT, own_norm: bool, pool_norm: bool) -> None:
    """Copies the encoder's weights; if the pool has its own norm, the encoder's last norm goes there or is dropped."""
    state = to_timm(EncoderSpec.of(encoder), encoder.state_dict())
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


def _freeze(vit: VisionTransformer, trained_blocks: int | None) -> None:
    """Freezes all but the last `trained_blocks` blocks, the last norm and the head (0: but the head; None: nothing)."""
    if trained_blocks is None:
        return
    blocks = list(vit.blocks)
    vit.requires_grad_(False)
    after = [vit.norm, vit.head] if trained_blocks else [vit.head]
    for module in blocks[len(blocks) - trained_blocks :] + after:
        module.requires_grad_(True)
