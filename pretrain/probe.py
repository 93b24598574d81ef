"""How good an encoder is before anything is trained on it: k-NN and ridge regression on its frozen features.

The weighted vote is DINO's: of the k nearest by cosine, each with weight exp(cosine / 0.07). While a run pretrains,
these numbers say early whether it is healthy; they are low for pixel methods, and it is their course that counts.
"""

import copy
import math
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data.eval_loader import EvalLoader
from data.image_folder import Samples, load_samples
from data.labels import check_labels, check_same_classes
from pretrain.config import PretrainConfig
from pretrain.models.features import features
from pretrain.models.patches import normalize_pixels
from pretrain.models.vit import ViT
from pretrain.trainer.accuracy import topk_hits
from pretrain.trainer.launch import World
from pretrain.trainer.per_sample import compute_per_sample

Pool = Literal["mean", "class"]

TEMPERATURE = 0.07
SIMILARITIES = 1 << 27  # that are in memory at once
RIDGE = 1e-3  # of the features' mean variance
METRICS = ("knn_top1", "knn_top5", "knn_plain_top1", "linear_top1")


class Probe:
    """Measures the encoder of a run. It has a copy of it, so that nothing of the training is touched.

    Args:
        config: with its `probe` section.
        encoder: that will be trained; not partitioned yet.
        world, device: where this rank is, and computes.

    Raises:
        ValueError: sets that do not fit, with both sides named.
    """

    def __init__(self, config: PretrainConfig, encoder: ViT, world: World, device: torch.device):
        assert config.probe is not None
        train, val = load_samples(config.probe.train), load_samples(config.probe.val)
        check_sets(train, val, config.probe.k)
        self.sets = [
            EvalLoader(
                samples,
                size=config.data.height_width,
                batch=config.train.global_batch_size // (world.size * config.train.gradient_accumulation_steps),
                rank=world.rank,
                world_size=world.size,
                num_workers=config.data.num_workers,
            )
            for samples in (train, val)
        ]
        self.k = config.probe.k
        self.device, self.bf16 = device, config.train.precision == "bf16"
        self.copy = copy.deepcopy(encoder).eval()

    @torch.no_grad()
    def measure(self, encoder: ViT) -> dict[str, float]:
        """`probe` of the trained encoder as it is now; called by all ranks together, in any ZeRO stage."""
        import deepspeed

        trained = list(encoder.parameters())
        with deepspeed.zero.GatheredParameters(trained):  # no-op below stage 3
            for mine, theirs in zip(self.copy.parameters(), trained, strict=True):
                mine.copy_(theirs)
        try:
            return probe(self.copy.to(self.device), *self.sets, k=self.k, device=self.device, bf16=self.bf16)
        finally:
            self.copy.cpu()  # the training needs the device's memory


def check_sets(train: Samples, val: Samples, k: int) -> None:
    """Raises ValueError where the two sets cannot be compared."""
    for samples in (train, val):
        check_labels(samples)
    advice = "the probe's train and val need the same classes"
    check_same_classes(train.classes, str(train.root), val.classes, str(val.root), advice)
    if train.classes and val.classes and len(train.classes) != len(val.classes):
        raise ValueError(f"{train.root} has {len(train.classes)} classes, {val.root} has {len(val.classes)}: {advice}")
    if k > len(train):
        raise ValueError(f"k={k} neighbours, but {train.root} has {len(train)} images: set k lower")


@torch.no_grad()
def probe(
    encoder: ViT,
    train: EvalLoader,
    val: EvalLoader,
    *,
    k: int,
    device: torch.device,
    bf16: bool = False,
    pool: Pool = "mean",
) -> dict[str, float]:
    """Shares of all images of `val` that are right; called by all ranks together, and the same on all of them.

    Args:
        encoder: in eval mode, whole, on the device.
        train: where neighbours are looked for; images that cannot be decoded are not among them.
        val: what is queries_all for; an image that cannot be decoded is wrong.
        k: neighbours that vote.
        pool: the `mean` of the patch tokens, or the `class` token, as DINO does.

    Returns:
        `METRICS`: k-NN with weighted votes (top-1 and top-5), with plain ones, and ridge regression. NaN where the
        features are not finite.
    """
    bank, readable = extract(encoder, train, device, bf16, pool, "probe: train")
    labels = torch.from_numpy(train.samples.label[train.indices]).long()[readable].to(device)
    bank = bank[readable].to(device)
    queries_all, query_readable = extract(encoder, val, device, bf16, pool, "probe: val")
    wanted = torch.from_numpy(val.samples.label[val.indices]).long()
    if not (torch.isfinite(bank).all() and torch.isfinite(queries_all).all()) or not len(bank):
        return dict.fromkeys(METRICS, math.nan)
    classes = int(max(labels.max(), wanted.max())) + 1
    weight, bias = ridge(bank, labels, classes)
    right = torch.zeros(len(METRICS), dtype=torch.int64, device=device)
    mine = torch.arange(len(queries_all))[query_readable][val.rank :: val.world_size]
    for part in mine.split(max(SIMILARITIES // len(bank), 1)):
        queries, target = queries_all[part].to(device), wanted[part].to(device)
        weighted, plain = votes(bank, labels, queries, min(k, len(bank)), classes)
        linear = queries.double() @ weight + bias
        has_votes = weighted.gather(1, target[:, None]) > 0  # one of the five may have none
        hits = [topk_hits(weighted, target) * has_votes, *(topk_hits(x, target, ks=(1,)) for x in (plain, linear))]
        right += torch.cat(hits, dim=1).sum(0)
    if val.world_size > 1:
        dist.all_reduce(right)
    return {name: count / len(queries_all) for name, count in zip(METRICS, right.tolist(), strict=True)}


def extract(
    encoder: ViT, loader: EvalLoader, device: torch.device, bf16: bool, pool: Pool, description: str
) -> tuple[Tensor, Tensor]:
    """(N, D) features of unit length in fp32, the same on all ranks, and which images could be decoded: (N,)."""

    def compute(images: Tensor, numbers: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            tokens = features(encoder, normalize_pixels(images).movedim(-1, 1)).float()
        return F.normalize(tokens[:, 0] if pool == "class" else tokens[:, 1:].mean(1))

    return compute_per_sample(compute, loader, device, description)


def votes(bank: Tensor, labels: Tensor, queries: Tensor, k: int, classes: int) -> tuple[Tensor, Tensor]:
    """What the k nearest of (N, D) unit features vote for each of (Q, D): weighted and plain, (Q, C) each."""
    cosine, nearest = (queries @ bank.T).topk(k)
    nothing = cosine.new_zeros(len(queries), classes)
    weighted = nothing.scatter_add(1, labels[nearest], torch.exp(cosine / TEMPERATURE))
    return weighted, nothing.scatter_add(1, labels[nearest], torch.ones_like(cosine))


def ridge(bank: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Regression from (N, D) features to one-hot labels: (D, C) weights and (C,) biases, in float64.

    The penalty is `RIDGE` of the features' mean variance, so that it means the same for every encoder.
    """
    mean = bank.double().mean(0)
    centred = bank.double() - mean
    gram = centred.T @ centred
    penalty = RIDGE * gram.diagonal().mean().clamp(min=1e-12)  # an encoder that collapsed has no variance
    sums = centred.new_zeros(classes, bank.shape[1]).index_add_(0, labels, centred)
    weight = torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), sums.T)
    share = torch.bincount(labels, minlength=classes).double() / len(labels)
    return weight, share - mean @ weight
