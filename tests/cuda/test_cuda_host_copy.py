"""Host copies for checkpoints are pinned snapshots: later weight updates do not change them."""

import pytest
import torch

from pretrain.trainer.host_copy import HostCopies

pytestmark = pytest.mark.cuda


def test_copies_are_pinned_snapshots_and_memory_is_reused(device: torch.device):
    weights, copies = torch.arange(1 << 24, device=device, dtype=torch.float32), HostCopies()
    for round_ in range(2):
        before = weights.clone().cpu()
        copied = copies.copy({"w": weights, "half": weights[: 1 << 23], "step": torch.tensor(float(round_))})
        copies.wait()
        weights.add_(1)
        assert torch.equal(copied["w"], before)
        assert torch.equal(copied["half"], before[: 1 << 23])
        assert copied["w"].is_pinned() == (device.type == "cuda")
        assert copied["step"].item() == round_
        copies.release()
    assert len(copies._free) == 2, "the same memory, twice"
    assert all(len(kept) == 1 for kept in copies._free.values())
