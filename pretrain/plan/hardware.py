"""What GPUs and the links between them can do, from makers' data sheets and measurements.

Units: TFLOP/s without sparsity, GB/s = 1e9 bytes a second in one direction, GiB of memory.
"""

from dataclasses import dataclass

from pretrain.trainer.schema import nearest


@dataclass(frozen=True)
class GPU:
    """One kind of GPU.

    Attributes:
        tflops: peak of bf16 matrix products with fp32 accumulation.
        gemm_share: the share of it that the best matrix products reach.
        fp32_tflops: peak in fp32 outside tensor cores; of matrix products too, as torch uses no TF32 by default.
        bandwidth: GB/s of its memory by the data sheet.
        memory: GiB that a process can allocate.
        nvlink: GB/s of a GPU to the others of its node; 0: they are connected by PCIe.
        pcie: GB/s of its PCIe slot.
        network: Gb/s of all network adapters of a node as the maker or clouds build it.
        bf16: whether it computes in bf16.
        hopper: whether its compute capability is 9.x, which determines how the window kernel is launched.
    """

    tflops: float
    gemm_share: float
    fp32_tflops: float
    bandwidth: float
    memory: float
    nvlink: float
    pcie: float
    network: float
    bf16: bool = True
    hopper: bool = False


# Peaks, bandwidths and links: NVIDIA's data sheets (dense; the sheets of consumer GPUs are the architecture papers).
# gemm_share: "maximum achievable matmul FLOPS" of stas00/ml-engineering, compute/accelerator, where it has the GPU:
# A100 SXM 267.9 of 312, A100 PCIe 256.4, H100 and H200 794.5 of 989, GH200 821, B200 1745 of 2250. No measurements
# were found for the others: a guess of 0.75, or 0.65 if the power limit is far below an SXM module's (L40S, L4).
UNMEASURED, POWER_LIMITED = 0.75, 0.65
GPUS = {
    "b200": GPU(2250, 0.776, 80, 8000, 178, 900, 64, 3200),
    "gh200": GPU(989, 0.830, 67, 4000, 94, 450, 64, 400, hopper=True),
    "h200": GPU(989, 0.803, 67, 4800, 139, 450, 64, 3200, hopper=True),
    "h100": GPU(989, 0.803, 67, 3350, 79, 450, 64, 3200, hopper=True),
    "h100-pcie": GPU(756, UNMEASURED, 51, 2000, 79, 0, 64, 400, hopper=True),
    "a100": GPU(312, 0.859, 19.5, 2039, 79, 300, 32, 1600),
    "a100-40gb": GPU(312, 0.859, 19.5, 1555, 39, 300, 32, 1600),
    "a100-pcie": GPU(312, 0.822, 19.5, 1935, 79, 0, 32, 200),
    "l40s": GPU(362, POWER_LIMITED, 91.6, 864, 44, 0, 32, 200),
    "a6000": GPU(155, UNMEASURED, 38.7, 768, 47, 0, 32, 100),
    "a10": GPU(125, POWER_LIMITED, 31.2, 600, 22, 0, 32, 100),
    "l4": GPU(121, POWER_LIMITED, 30.3, 300, 22, 0, 32, 100),
    "rtx5090": GPU(210, UNMEASURED, 105, 1792, 31, 0, 64, 10),
    "rtx4090": GPU(165, UNMEASURED, 82.6, 1008, 23, 0, 32, 10),
    "rtx3090": GPU(71, UNMEASURED, 35.6, 936, 23, 0, 32, 10),
    "v100": GPU(125, UNMEASURED, 15.7, 900, 31, 150, 16, 100, bf16=False),
    "t4": GPU(65, POWER_LIMITED, 8.1, 300, 14, 0, 16, 50, bf16=False),
}

COPY_SHARE = 0.90  # of the data sheet's bandwidth that a copy reaches: 3.0 of 3.35 TB/s, 4.3 of 4.8
KERNEL_SHARE = 0.90  # of a copy's rate that an element-wise kernel reaches
NVLINK_SHARE = 0.80  # of the link that NCCL's rings reach for messages of tens of MB
PCIE_SHARE = 0.50  # the same where the GPUs of a node share host bridges
NETWORK_SHARE = 0.90


def find_gpu(name: str) -> GPU:
    """The GPU with a name. Raises ValueError, with the nearest name, if there is none."""
    key = name.lower().replace("_", "-").replace(" ", "-")
    if key not in GPUS:
        raise ValueError(f"--gpu {name} is not known to the planner: {nearest(key, list(GPUS))}")
    return GPUS[key]


def stream_rate(gpu: GPU) -> float:
    """Bytes a second that an element-wise kernel moves."""
    return gpu.bandwidth * 1e9 * COPY_SHARE * KERNEL_SHARE


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes of equal size; if they do not fill one node, there is one.

    Attributes:
        gpus: how many in all.
        per_node: how many in each node.
        network: Gb/s of all network adapters of a node together.
    """

    gpu: GPU
    gpus: int
    per_node: int
    network: float

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.per_node)

    @property
    def link(self) -> str:
        """The name of the link within a node."""
        return "NVLink" if self.gpu.nvlink else "PCIe"


def build_cluster(gpu: str, gpus: int, per_node: int = 8, network: float | None = None) -> Cluster:
    """The cluster of a command line.

    Raises:
        ValueError: the GPU is unknown, a number is not positive, or the GPUs do not fill nodes.
    """
    kind = find_gpu(gpu)
    for option, number in (("--gpus", gpus), ("--gpus-per-node", per_node)):
        if number < 1:
            raise ValueError(f"{option} {number} must be at least 1")
    if network is not None and network <= 0:
        raise ValueError(f"--link {network:g}, the Gb/s of a node's network, must be above 0")
    per_node = min(per_node, gpus)
    if gpus % per_node:
        raise ValueError(
            f"--gpus {gpus} does not fill nodes of {per_node}: set --gpus to {gpus // per_node * per_node} or "
            f"{(gpus // per_node + 1) * per_node}, or --gpus-per-node to a divisor of {gpus}"
        )
    return Cluster(kind, gpus, per_node, network or kind.network)
