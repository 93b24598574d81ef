"""The quality of an encoder, by measures from cheap to meaningful, and which of them to trust.

k-NN and ridge regression see one vector for each image and rank masked image models wrongly: they rate MAE's ViT-B
below DINO's ViT-S, which fine-tunes worse. The attentive probe measures what the patch tokens hold, and a short
fine-tuning what the encoder becomes: docs/classification.md has the numbers.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data.eval_loader import EvalLoader
from data.image_folder import Samples
from data.labels import check_labels, check_same_classes
from data.messages import counted
from pretrain.models.features import Kind, check_blocks, pooled_features
from pretrain.models.vit import ViT
from pretrain.probe import attentive, finetuning, neighbors
from pretrain.probe.settings import ProbeSettings
from pretrain.trainer.accuracy import topk_hits
from pretrain.trainer.per_sample import compute_per_sample

JUDGE_BY, JUDGE_REASON = "judge_by", "judge_reason"
FINETUNE_STEPS = "finetune_steps"
Measured = dict[str, float | str]
Encode = Callable[[Tensor], list[Tensor]]


def check_sets(train: Samples, val: Samples, k: int) -> None:
    """Raises ValueError if the two sets cannot be used together."""
    for samples in (train, val):
        check_labels(samples)
        if samples.multi_labels is not None:
            raise ValueError(f"{samples.root} has lists of labels, but a probe needs one label for each image")
    advice = "the probe's train and val need the same classes"
    check_same_classes(train.classes, str(train.root), val.classes, str(val.root), advice)
    if train.classes and val.classes and len(train.classes) != len(val.classes):
        raise ValueError(f"{train.root} has {len(train.classes)} classes, {val.root} has {len(val.classes)}: {advice}")
    if k > len(train):
        raise ValueError(f"k={k} neighbors, but {train.root} has {len(train)} images: lower k")


def names_of(settings: ProbeSettings) -> tuple[str, ...]:
    """The names of the measures."""
    further = attentive.METRICS if settings.attentive_steps else ()
    return neighbors.METRICS + further + ((*finetuning.METRICS, FINETUNE_STEPS) if settings.finetune_epochs else ())


def trusted(settings: ProbeSettings, finetune_images: int) -> tuple[str, str]:
    """The name of the measure to compare encoders by, or `none`, and the reason.

    Args:
        settings: what is measured.
        finetune_images: how many images a copy of the encoder was fine-tuned on.
    """
    why = ""
    if settings.finetune_epochs:
        per_epoch, enough = finetuning.steps_per_epoch(finetune_images), finetuning.ENOUGH_STEPS
        steps = settings.finetune_epochs * per_epoch
        if steps >= enough:
            return "finetune_top1", f"the fine-tuning had {steps} steps, and needs at least {enough}"
        why = (
            f"the fine-tuning had {counted(steps, 'step')} on {finetune_images} images, and says little about an "
            f"encoder with fewer than {enough}: set finetune_epochs to {math.ceil(enough / per_epoch)}, or use more "
            f"images; "
        )
    if settings.attentive_steps >= attentive.ENOUGH_STEPS:
        return (
            "attentive_top1",
            f"{why}the attentive probe sees the patch tokens, where masked image models keep the most",
        )
    return "none", (
        f"{why}k-NN and ridge regression do not rank masked image models, and the attentive probe has "
        f"{counted(settings.attentive_steps, 'step')}: set attentive_steps to at least {attentive.ENOUGH_STEPS}"
    )


def _judgement(settings: ProbeSettings, measured: Measured, finetune_images: int) -> Measured:
    name, reason = trusted(settings, finetune_images)
    if any(isinstance(value, float) and math.isnan(value) for value in measured.values()):
        name, reason = "none", "features are not finite, or no training image could be decoded"
    return {JUDGE_BY: name, JUDGE_REASON: reason}


def describe(measured: Measured) -> str:
    """A table of the measures, the most meaningful first, with what each number is worth."""
    steps = measured.get(FINETUNE_STEPS)
    worth = {
        "finetune_top1": f"the encoder after {counted(int(steps), 'step')} of fine-tuning" if steps is not None else "",
        "attentive_top1": "what its patch tokens hold",
        "linear_top1": "from one vector per image: ranks masked image models wrongly",
        "knn_top1": "as above, even more so",
    }
    lines = [f"{name:16}{measured[name]:8.2%}   {why}" for name, why in worth.items() if name in measured]
    judge = "none of these" if measured[JUDGE_BY] == "none" else measured[JUDGE_BY]
    return "\n".join([*lines, f"compare encoders by {judge}: {measured[JUDGE_REASON]}"])


class _Learned(NamedTuple):
    """The training images' (N, D) unit vectors and (N,) classes on the device, and the samples to fit models on."""

    bank: Tensor
    bank_labels: Tensor
    samples: np.ndarray  # int64, of all ranks
    tokens: attentive.Tokens  # of this rank
    pixels: finetuning.Images
    dim: int  # of a patch token


@torch.no_grad()
def probe(
    encoder: ViT,
    train: EvalLoader,
    val: EvalLoader,
    settings: ProbeSettings,
    *,
    device: torch.device,
    norm_after_pool: bool = False,
) -> Measured:
    """Accuracies on all images of `val`; called by all ranks together, with the same result on all of them.

    Args:
        encoder: in eval mode, not partitioned, on the device; it is not changed.
        train: the images to learn from; those that cannot be decoded are left out.
        val: the images to classify; one that cannot be decoded counts as wrong.
        settings: which features, and what to measure.
        device: where to compute.
        norm_after_pool: as for `image_features`.

    Returns:
        `names_of` the settings: k-NN with weighted votes (top-1 and top-5) and with plain ones, ridge regression, the
        attentive probe, and the fine-tuned copy with its number of steps. `JUDGE_BY` and `JUDGE_REASON` say which of
        them to trust, and why. NaN if features are not finite.

    Raises:
        ValueError: the encoder has no such block.
    """
    check_blocks(settings.block, len(encoder.blocks))

    def encode(images: Tensor) -> list[Tensor]:
        """(B, D) unit vectors and (B, N, D) patch tokens."""
        kinds: tuple[Kind, ...] = (settings.pool, "patches")
        vectors, patches = pooled_features(encoder, images, kinds, settings.block, norm_after_pool)
        return [F.normalize(vectors), patches]

    measured: Measured = dict.fromkeys(names_of(settings), math.nan)
    num_classes = 1 + int(max(train.samples.label.max(), val.samples.label.max()))
    learned = _read_train(encode, train, settings, device)
    images = 0 if learned is None else len(learned.samples)
    if learned is not None:
        measured |= _judge_frozen(encode, learned, train, val, num_classes, settings, device)
        if settings.finetune_epochs:
            tuned = finetuning.finetune(
                encoder,
                learned.pixels,
                learned.samples,
                train.samples.label,
                num_classes,
                train,
                epochs=settings.finetune_epochs,
                norm_after_pool=norm_after_pool,
                device=device,
            )
            hits, _ = compute_per_sample(
                lambda images, samples: _hits(tuned(images), val, samples), val, device, "fine-tuned: val"
            )
            measured |= dict(zip(finetuning.METRICS, hits.mean(0).tolist(), strict=True))
            measured[FINETUNE_STEPS] = settings.finetune_epochs * finetuning.steps_per_epoch(images)
    return measured | _judgement(settings, measured, images)


def _read_train(encode: Encode, train: EvalLoader, settings: ProbeSettings, device: torch.device) -> _Learned | None:
    """One pass over the training images; None if features are not finite, or if there is no image to learn from."""
    tokens: attentive.Tokens = {}
    pixels: finetuning.Images = {}
    samples = np.unique(np.linspace(0, len(train.samples) - 1, settings.max_images).round().astype(np.int64))
    wanted, dim = set(samples.tolist()), 0

    def keep(images: Tensor, numbers: Tensor) -> Tensor:
        nonlocal dim
        vectors, patches = encode(images)
        dim = patches.shape[-1]
        rows = [(row, number) for row, number in enumerate(numbers.tolist()) if number in wanted]
        if rows and settings.attentive_steps:
            stored = attentive.store(patches)
            tokens.update({number: stored[row].clone() for row, number in rows})
        if rows and settings.finetune_epochs:
            on_cpu = images.cpu()
            pixels.update({number: on_cpu[row].clone() for row, number in rows})
        return vectors

    bank, readable = compute_per_sample(keep, train, device, "probe: train")
    samples = samples[readable.numpy()[samples]]
    if not torch.isfinite(bank).all() or not len(samples):
        return None
    bank_labels = torch.tensor(train.samples.label).long()[readable]
    return _Learned(bank[readable].to(device), bank_labels.to(device), samples, tokens, pixels, dim)


def _judge_frozen(
    encode: Encode,
    learned: _Learned,
    train: EvalLoader,
    val: EvalLoader,
    num_classes: int,
    settings: ProbeSettings,
    device: torch.device,
) -> Measured:
    """k-NN, ridge regression and the attentive probe, in one pass over the images to classify."""
    head = None
    if settings.attentive_steps:
        head = attentive.fit_attentive_probe(
            learned.tokens,
            learned.samples,
            train.samples.label,
            num_classes,
            train,
            steps=settings.attentive_steps,
            dim=learned.dim,
            device=device,
        )
        learned.tokens.clear()

    def classify(images: Tensor, samples: Tensor) -> Tensor:
        """(B, D+2), the vectors, and `_hits` of the attentive probe; (B, D) without one."""
        vectors, patches = encode(images)
        return vectors if head is None else torch.cat([vectors, _hits(head(patches), val, samples)], dim=1)

    judged, readable = compute_per_sample(classify, val, device, "probe: val")
    queries, labels = judged[:, : learned.bank.shape[1]], torch.tensor(val.samples.label).long()
    if not torch.isfinite(queries).all():
        return {}
    mine = torch.arange(len(queries))[readable][val.rank :: val.world_size]
    correct = neighbors.neighbor_hits(
        learned.bank, learned.bank_labels, queries[mine], labels[mine], settings.k, num_classes
    )
    if val.world_size > 1:
        dist.all_reduce(correct)
    counts = dict(zip(neighbors.METRICS, correct.tolist(), strict=True))
    if head is not None:
        counts |= dict(zip(attentive.METRICS, judged[:, -2:].sum(0).tolist(), strict=True))
    return {name: count / len(queries) for name, count in counts.items()}


def _hits(logits: Tensor, val: EvalLoader, samples: Tensor) -> Tensor:
    """(B, 2) fp32: whether the right class is the first, or among the first five; arbitrary for padding."""
    labels = torch.tensor(val.samples.label).long()[samples]
    return topk_hits(logits, labels.to(logits.device)).float()
