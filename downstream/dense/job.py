"""The job that a detection or segmentation command asks for."""

from dataclasses import dataclass
from typing import Any

from pretrain.trainer.config import WatchdogConfig


@dataclass(frozen=True)
class Job:
    """A configuration and how to run it.

    Attributes:
        cfg: an mmengine Config, with all overrides.
        ds_config: DeepSpeed's engine keys, a name in ds_configs/ or a file; None means mmengine's own Runner.
        resume: whether to continue the training in `work_dir`, if there is one.
        test: a checkpoint to evaluate instead of training.
        tta: whether to evaluate it with test-time augmentation, using the configuration's `tta_model`.
    """

    cfg: Any
    ds_config: str | None = None
    resume: bool = True
    test: str | None = None
    tta: bool = False

    @property
    def watchdog(self) -> WatchdogConfig:
        """The usual time limits; they do not apply to mmengine's steps."""
        return WatchdogConfig()

    def memory_advice(self, ranks: int) -> str:
        """Advice naming the keys to change when a GPU runs out of memory."""
        loader = "test_dataloader" if self.test else "train_dataloader"
        advice = f"lower {loader}.batch_size (it is {self.cfg[loader]['batch_size']})"
        if self.test:
            return advice
        return f"{advice} and raise optim_wrapper.accumulative_counts, or set model.backbone.grad_checkpointing=true"
