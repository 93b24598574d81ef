"""What the ranks send each other in a step, and how much of it the backward pass does not hide."""

import math
from dataclasses import dataclass

from pretrain.plan.hardware import NETWORK_SHARE, NVLINK_SHARE, PCIE_SHARE, Cluster
from pretrain.plan.memory import Zero

LATENCY = 10e-6  # seconds for each of the log2(ranks) rounds of a collective, there and back
_FP32 = 4


@dataclass(frozen=True)
class Communication:
    """The communication of one optimizer step.

    Attributes:
        node_bytes: bytes that a GPU sends to others of its node.
        network_bytes: bytes that a node sends to other nodes.
        node_seconds, network_seconds: the time on each link; NCCL uses both at once.
        seconds: of all collectives.
        exposed: the part of `seconds` in which GPUs wait.
    """

    node_bytes: float = 0.0
    network_bytes: float = 0.0
    node_seconds: float = 0.0
    network_seconds: float = 0.0
    seconds: float = 0.0
    exposed: float = 0.0


def step_communication(
    parameters: int, zero: Zero, cluster: Cluster, micro_batches: int, forward: float, backward: float
) -> Communication:
    """The communication of an optimizer step.

    Stage 0 sums all gradients after the last backward pass. Stages 1 and 2 do so bucket by bucket, during that pass
    with `overlap_comm`, and gather the new weights; stage 2 sums in each micro-batch. Stage 3 gathers the weights for
    each forward and each backward pass, ahead of the blocks that need them, and reduces gradients to their owners.

    Args:
        forward, backward: seconds of a micro-batch's passes.
    """
    if cluster.gpus == 1:
        return Communication()
    size = float(_FP32 * parameters)
    buckets = max(math.ceil(parameters / zero.bucket), 1)
    if zero.stage == 3:
        gather = _collective(size, 1, buckets, cluster)
        reduce = _collective(size, 1, buckets, cluster)
        hidden = [(gather, forward), (gather, backward), (reduce, backward)]
        parts = [(once, _exposed(once, beside, buckets, zero.overlap)) for once, beside in hidden] * micro_batches
    else:
        all_reduce = _collective(size, 2, buckets if zero.stage else 1, cluster)
        times = micro_batches if zero.stage == 2 else 1
        parts = [(all_reduce, _exposed(all_reduce, backward, buckets, zero.overlap))] * times
        if zero.stage:
            gather = _collective(size, 1, buckets, cluster)
            parts.append((gather, gather.seconds))
    return Communication(
        sum(part.node_bytes for part, _ in parts),
        sum(part.network_bytes for part, _ in parts),
        sum(part.node_seconds for part, _ in parts),
        sum(part.network_seconds for part, _ in parts),
        sum(part.seconds for part, _ in parts),
        sum(exposed for _, exposed in parts),
    )


def _collective(size: float, passes: int, buckets: int, cluster: Cluster) -> Communication:
    """A reduce-scatter or an all-gather (`passes` = 1) of `size` bytes, or both, an all-reduce (2)."""
    local, nodes = cluster.per_node, cluster.nodes
    node_bytes = passes * (local - 1) / local * size
    network_bytes = passes * (nodes - 1) / nodes * size
    link, share = (cluster.gpu.nvlink, NVLINK_SHARE) if cluster.gpu.nvlink else (cluster.gpu.pcie, PCIE_SHARE)
    node_seconds = node_bytes / (link * 1e9 * share)
    network_seconds = network_bytes / (cluster.network / 8 * 1e9 * NETWORK_SHARE)
    rounds = passes * math.log2(cluster.gpus)
    seconds = max(node_seconds, network_seconds) + buckets * rounds * LATENCY
    return Communication(node_bytes, network_bytes, node_seconds, network_seconds, seconds)


def _exposed(part: Communication, beside: float, buckets: int, overlap: bool) -> float:
    """Seconds that are not hidden: the last bucket is full only when the pass ends."""
    if not overlap:
        return part.seconds
    return max(part.seconds - beside * (buckets - 1) / buckets, part.seconds / buckets)
