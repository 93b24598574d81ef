"""Settings that are probably a mistake: the run warns about them when it starts, and goes on."""

from collections.abc import Iterator

import torch

from pretrain.trainer.config import RunConfig

TINY_RATE = 1e-4  # at a batch of 256; scales with the square root of the batch, by which AdamW's noise falls
FEW_STEPS = 8  # per epoch


def has_fast_bf16(device: torch.device) -> bool:
    """False for a CPU without AVX-512 or the like, which takes ten times as long in bf16 as in fp32."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def cautions(config: RunConfig, samples: int, steps_per_epoch: int, device: torch.device) -> Iterator[str]:
    """One sentence for each setting that trains next to nothing or very slowly, with what to set instead.

    Args:
        samples: the size of the training set.
        steps_per_epoch: the number of whole batches in it.
        device: where the run computes.
    """
    if config.train.precision == "bf16" and not has_fast_bf16(device):
        yield "this CPU has no fast bf16 arithmetic: train.precision=fp32 is about ten times faster here"
    optim, batch = config.optim, config.train.global_batch_size
    base = optim.lr_batch_size
    if config.peak_lr < TINY_RATE * (batch / 256) ** 0.5 and batch < base:
        wanted = optim.base_lr * (base / batch) ** 0.5
        yield (
            f"the learning rate is only {config.peak_lr:.2g}: optim.base_lr={optim.base_lr:g} is for a batch of {base} "
            f"and scales with train.global_batch_size={batch}. Set a larger batch (train.gradient_accumulation_steps "
            f"makes room), or optim.base_lr={wanted:.1e} for square-root scaling"
        )
    if steps_per_epoch < FEW_STEPS:
        unseen = samples - steps_per_epoch * batch
        left = f", and each epoch leaves out {unseen} samples" if unseen > samples // 10 else ""
        fitting = 1 << max((samples // 20).bit_length() - 1, 0)
        smaller = f"set a smaller batch, such as train.global_batch_size={fitting}; " if fitting >= FEW_STEPS else ""
        yield (
            f"{samples} samples in batches of {batch} make only {steps_per_epoch} steps per epoch, "
            f"{steps_per_epoch * config.train.epochs} in all{left}: {smaller}see docs/small.md about small data sets"
        )
