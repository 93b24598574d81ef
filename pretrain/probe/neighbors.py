"""k-NN and ridge regression on one vector for each image.

The weighted vote is DINO's: the k nearest neighbors by cosine similarity, each with weight exp(cosine / 0.07).
"""

import torch
from torch import Tensor

from pretrain.trainer.accuracy import topk_hits

TEMPERATURE = 0.07
MAX_SIMILARITIES = 1 << 27  # in memory at once
RIDGE = 1e-3  # of the features' mean variance
METRICS = ("knn_top1", "knn_top5", "knn_plain_top1", "linear_top1")


def neighbor_hits(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int, num_classes: int
) -> Tensor:
    """How many queries are right by each of `METRICS`, int64 (4,), on the bank's device.

    Args:
        bank, bank_labels: (N, D) normalized features and their (N,) classes, on the device.
        queries, labels: (Q, D) and (Q,), on any device; moved to the bank's device in parts.
        k: neighbors that vote; all of the bank if it has fewer.
        num_classes: C.
    """
    weight, bias = ridge(bank, bank_labels, num_classes)
    correct = torch.zeros(len(METRICS), dtype=torch.int64, device=bank.device)
    for part in torch.arange(len(queries)).split(max(MAX_SIMILARITIES // len(bank), 1)):
        part_queries, part_labels = queries[part].to(bank.device), labels[part].to(bank.device)
        weighted, plain = votes(bank, bank_labels, part_queries, min(k, len(bank)), num_classes)
        linear = part_queries.double() @ weight + bias
        has_votes = weighted.gather(1, part_labels[:, None]) > 0  # a class without votes is no answer
        hits = [topk_hits(weighted, part_labels) * has_votes]
        hits += [topk_hits(scores, part_labels, ks=(1,)) for scores in (plain, linear)]
        correct += torch.cat(hits, dim=1).sum(0)
    return correct


def votes(bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Votes of the k nearest of (N, D) normalized features for (Q, D) queries: weighted and plain, (Q, C) each."""
    cosine, nearest = (queries @ bank.T).topk(k)
    zeros, candidates = cosine.new_zeros(len(queries), num_classes), bank_labels[nearest]
    weighted = zeros.scatter_add(1, candidates, torch.exp(cosine / TEMPERATURE))
    return weighted, zeros.scatter_add(1, candidates, torch.ones_like(cosine))


def ridge(bank: Tensor, bank_labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Regression from (N, D) features to one-hot labels: (D, C) weights and (C,) biases, in float64.

    The penalty is `RIDGE` times the features' mean variance, so that it is comparable between encoders.
    """
    mean = bank.double().mean(0)
    centered = bank.double() - mean
    gram = centered.T @ centered
    penalty = RIDGE * gram.diagonal().mean().clamp(min=1e-12)  # a collapsed encoder has no variance
    sums = centered.new_zeros(num_classes, bank.shape[1]).index_add_(0, bank_labels, centered)
    weight = torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), sums.T)
    share = torch.bincount(bank_labels, minlength=num_classes).double() / len(bank_labels)
    return weight, share - mean @ weight
