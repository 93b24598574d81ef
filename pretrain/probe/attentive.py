"""An attentive probe: cross-attention with learned queries over frozen patch tokens, and a linear layer.

Masked image models leave an image's content in the patch tokens, and a mean over all of them loses it. This is
Efficient Probing (Psomas et al., ICLR 2026, arXiv 2506.10178): queries attend to the tokens themselves, without a
projection of keys, and each has its own part of the values. Tokens are first standardized per channel, so that encoders
and blocks of any scale are comparable. The recipe is ours: AdamW, a fixed number of steps, no augmentation.

Shapes: B images, N patches, D channels, Q queries, C classes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.eval_loader import EvalLoader
from pretrain.probe.fitting import draw_batches, fit, normal
from pretrain.trainer.per_sample import sum_over_ranks

QUERIES = 16
BATCH = 256
# The rate is 1 / D, so that a step changes sums over channels equally whatever the width; at 192 channels 0.005.
QUERY_RATE = 1 / 3  # of the other parameters' rate: queries see whole tokens, the others only means of them
DECAY = 2.5e-3  # of the parameters in a step at the highest rate
METRICS = ("attentive_top1", "attentive_top5")
ENOUGH_STEPS = 100  # a fifth of the default; the first tenth of them is warm-up, and the linear layer starts at zero
_LARGEST = torch.finfo(torch.float16).max

Tokens = dict[int, Tensor]  # by sample: (N, D) float16, on the CPU


def store(tokens: Tensor) -> Tensor:
    """Patch tokens as they are kept until the probe is trained: float16 on the CPU."""
    return tokens.clamp(-_LARGEST, _LARGEST).half().cpu()


class AttentiveProbe(nn.Module):
    """Patch tokens -> logits.

    Args:
        mean, std: (D,) of all patch tokens of the training images.
        num_classes: C.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, num_classes: int):
        super().__init__()
        dim, width = len(mean), max(len(mean) // QUERIES, 1)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.query = nn.Parameter(normal((QUERIES, dim), 0.02 * dim**-0.5, 1))
        self.value = nn.Parameter(normal((QUERIES, dim, width), dim**-0.5, 2))
        self.weight = nn.Parameter(torch.zeros(num_classes, QUERIES * width))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) of any dtype -> (B, C) fp32."""
        # Tokens are standardized and values projected after the sum: the same result, for 1/N of the work. The weights
        # of a sum add up to 1, and the softmax ignores what the mean adds to all logits of a query.
        x = tokens.float()
        attention = (x @ (self.query / self.std).T).softmax(1)  # (B, N, Q)
        pooled = (attention.transpose(1, 2) @ x - self.mean) / self.std
        values = torch.einsum("bqd,qdw->bqw", pooled, self.value)
        return F.linear(values.flatten(1), self.weight, self.bias)


def token_statistics(tokens: Tokens, samples: np.ndarray, dim: int, world_size: int, device: torch.device) -> Tensor:
    """(2, D) fp32: mean and standard deviation of each channel over the patch tokens of all samples, of all ranks."""
    sums = torch.zeros(2, dim, dtype=torch.float64)
    count = torch.zeros(1, dtype=torch.int64)
    for sample in samples.tolist():
        if sample in tokens:
            x = tokens[sample].double()
            sums += torch.stack([x.sum(0), x.square().sum(0)])
            count += len(x)
    for tensor in (sums, count):
        sum_over_ranks(tensor, world_size, device)
    mean, square = sums / count
    return torch.stack([mean, (square - mean.square()).clamp(min=0).add(1e-6).sqrt()]).float()


def fit_attentive_probe(
    tokens: Tokens,
    samples: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    loader: EvalLoader,
    *,
    steps: int,
    dim: int,
    device: torch.device,
) -> AttentiveProbe:
    """Trains a probe; called by all ranks together, with the same weights on all of them.

    Args:
        tokens: of this rank's part of the samples.
        samples: those to learn from, of all ranks.
        labels: int, the class of every sample of the set.
        num_classes: C.
        loader: of the set; gives the number of ranks.
        steps: of the optimizer, each on `BATCH` images.
        dim: D, even if this rank has no tokens.
        device: where to compute.

    Returns:
        The probe, on the device.
    """
    mean, std = token_statistics(tokens, samples, dim, loader.world_size, device)
    probe = AttentiveProbe(mean, std, num_classes).to(device)

    def losses(_: int, rows: np.ndarray) -> Tensor:
        batch = torch.stack([tokens[sample] for sample in rows.tolist()]).to(device)
        return F.cross_entropy(probe(batch), torch.from_numpy(labels[rows]).long().to(device), reduction="none")

    query, *others = probe.parameters()
    fit(
        [
            {"params": [query], "weight_decay": DECAY * dim, "lr_scale": QUERY_RATE},
            {"params": others, "weight_decay": DECAY * dim},
        ],
        losses,
        draw_batches(samples, BATCH, steps),
        tokens.__contains__,
        steps=steps,
        peak_lr=1 / dim,
        at_once=BATCH,
        world_size=loader.world_size,
        description="attentive probe",
    )
    return probe
