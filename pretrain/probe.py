"""The quality of an encoder without training on it: k-NN and ridge regression on its frozen features.

The weighted vote is DINO's: the k nearest neighbors by cosine similarity, each with weight exp(cosine / 0.07). During
pretraining these numbers show early whether a run is healthy; for methods that predict pixels they are low, and only
their trend is meaningful.
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
from pretrain.models.features import image_features
from pretrain.models.vit import ViT
from pretrain.trainer.accuracy import topk_hits
from pretrain.trainer.launch import World
from pretrain.trainer.per_sample import Compute, compute_per_sample

Pool = Literal["mean", "class"]

TEMPERATURE = 0.07
MAX_BATCH = 64  # images; as many as downstream.classify.knn takes at once, unless the run has less memory
MAX_SIMILARITIES = 1 << 27  # in memory at once
RIDGE = 1e-3  # of the features' mean variance
METRICS = ("knn_top1", "knn_top5", "knn_plain_top1", "linear_top1")


class Probe:
    """Measures the encoder of a run, on a copy, so that the training is not affected.

    Args:
        config: with its `probe` section.
        encoder: the one that will be trained; not partitioned yet.
        world, device: this rank, and the device that it computes on.

    Raises:
        ValueError: sets that cannot be used together; the message names both.
    """

    def __init__(self, config: PretrainConfig, encoder: ViT, world: World, device: torch.device):
        assert config.probe is not None
        train, val = load_samples(config.probe.train), load_samples(config.probe.val)
        check_sets(train, val, config.probe.k)
        micro_batch = config.train.global_batch_size // (world.size * config.train.gradient_accumulation_steps)
        self.train, self.val = (
            EvalLoader(
                samples,
                size=config.data.height_width,
                batch=min(micro_batch, MAX_BATCH),
                rank=world.rank,
                world_size=world.size,
                num_workers=config.data.num_workers,
            )
            for samples in (train, val)
        )
        self.k = config.probe.k
        self.device = device
        self.copy = copy.deepcopy(encoder).eval()
        self.copy.residual_dtype = None  # in fp32 whatever the run's precision: the numbers of downstream.classify.knn

    @torch.no_grad()
    def measure(self, encoder: ViT) -> dict[str, float]:
        """`probe` of the encoder's current weights; called by all ranks together, in any ZeRO stage."""
        import deepspeed

        trained = list(encoder.parameters())
        with deepspeed.zero.GatheredParameters(trained):  # no-op below stage 3
            for copied, current in zip(self.copy.parameters(), trained, strict=True):
                copied.copy_(current)
        try:
            return probe(self.copy.to(self.device), self.train, self.val, k=self.k, device=self.device)
        finally:
            self.copy.cpu()  # training needs the memory of the device


def check_sets(train: Samples, val: Samples, k: int) -> None:
    """Raises ValueError if the two sets cannot be used together."""
    for samples in (train, val):
        check_labels(samples)
        if samples.multi_labels is not None:
            raise ValueError(f"{samples.root} has lists of labels, k-NN needs one label for each image")
    advice = "the probe's train and val need the same classes"
    check_same_classes(train.classes, str(train.root), val.classes, str(val.root), advice)
    if train.classes and val.classes and len(train.classes) != len(val.classes):
        raise ValueError(f"{train.root} has {len(train.classes)} classes, {val.root} has {len(val.classes)}: {advice}")
    if k > len(train):
        raise ValueError(f"k={k} neighbors, but {train.root} has {len(train)} images: set k lower")


@torch.no_grad()
def probe(
    encoder: ViT,
    train: EvalLoader,
    val: EvalLoader,
    *,
    k: int,
    device: torch.device,
    pool: Pool = "mean",
    norm_after_pool: bool = False,
) -> dict[str, float]:
    """Accuracies on all images of `val`; called by all ranks together, with the same result on all of them.

    Args:
        encoder: in eval mode, not partitioned, on the device.
        train: the images among which neighbors are searched; those that cannot be decoded are left out.
        val: the images that are classified; one that cannot be decoded counts as wrong.
        k: neighbors that vote.
        pool: the `mean` of the patch tokens, or the `class` token, as DINO does.
        norm_after_pool: as of `image_features`.

    Returns:
        `METRICS`: k-NN with weighted votes (top-1 and top-5) and with plain ones, and ridge regression. NaN if features
        are not finite.
    """

    def compute(images: Tensor, _: Tensor) -> Tensor:
        return F.normalize(image_features(encoder, images, pool, norm_after_pool=norm_after_pool))

    bank, bank_labels, readable = extract(compute, train, device, "probe: train")
    bank, bank_labels = bank[readable].to(device), bank_labels[readable].to(device)
    queries, labels, readable = extract(compute, val, device, "probe: val")
    if not (torch.isfinite(bank).all() and torch.isfinite(queries).all()) or not len(bank):
        return dict.fromkeys(METRICS, math.nan)
    num_classes = int(max(bank_labels.max(), labels.max())) + 1
    weight, bias = ridge(bank, bank_labels, num_classes)
    correct = torch.zeros(len(METRICS), dtype=torch.int64, device=device)
    of_this_rank = torch.arange(len(queries))[readable][val.rank :: val.world_size]
    for part in of_this_rank.split(max(MAX_SIMILARITIES // len(bank), 1)):
        part_queries, part_labels = queries[part].to(device), labels[part].to(device)
        weighted, plain = votes(bank, bank_labels, part_queries, min(k, len(bank)), num_classes)
        linear = part_queries.double() @ weight + bias
        has_votes = weighted.gather(1, part_labels[:, None]) > 0  # a class without votes is no answer
        hits = [topk_hits(weighted, part_labels) * has_votes]
        hits += [topk_hits(scores, part_labels, ks=(1,)) for scores in (plain, linear)]
        correct += torch.cat(hits, dim=1).sum(0)
    if val.world_size > 1:
        dist.all_reduce(correct)
    return {name: count / len(queries) for name, count in zip(METRICS, correct.tolist(), strict=True)}


def extract(
    compute: Compute, loader: EvalLoader, device: torch.device, description: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Of all images, on all ranks: (N, D) fp32 features, (N,) labels, and (N,) whether it is readable."""
    computed, readable = compute_per_sample(compute, loader, device, description)
    return computed, torch.from_numpy(loader.samples.label[loader.indices]).long(), readable


def votes(bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Votes of the k nearest of (N, D) normalized features for (Q, D) queries: weighted and plain, (Q, C) each."""
    cosine, nearest = (queries @ bank.T).topk(k)
    zeros, candidates = cosine.new_zeros(len(queries), num_classes), bank_labels[nearest]
    weighted = zeros.scatter_add(1, candidates, torch.exp(cosine / TEMPERATURE))
    return weighted, zeros.scatter_add(1, candidates, torch.ones_like(cosine))


def ridge(bank: Tensor, bank_labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Regression from (N, D) features to one-hot labels: (D, C) weights and (C,) biases, in float64.

    The penalty is `RIDGE` of the features' mean variance, so that it is comparable between encoders.
    """
    mean = bank.double().mean(0)
    centered = bank.double() - mean
    gram = centered.T @ centered
    penalty = RIDGE * gram.diagonal().mean().clamp(min=1e-12)  # a collapsed encoder has no variance
    sums = centered.new_zeros(num_classes, bank.shape[1]).index_add_(0, bank_labels, centered)
    weight = torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), sums.T)
    share = torch.bincount(bank_labels, minlength=num_classes).double() / len(bank_labels)
    return weight, share - mean @ weight
