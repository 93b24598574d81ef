"""What a command of detection or segmentation asks for."""

from dataclasses import dataclass
from typing import Any

from pretrain.trainer.config import WatchdogConfig


@dataclass(frozen=True)
class Job:
    """A configuration and how it is run.

    Attributes:
        cfg: an mmengine Config, with all overrides.
        ds_config: DeepSpeed's engine keys, a name in ds_configs/ or a file; None is mmengine's own Runner.
        resume: whether the training in `work_dir`, if there is one, is continued.
        test: a checkpoint to evaluate instead of training.
        tta: whether it is evaluated with test-time augmentation, by the configuration's `tta_model`.
    """

    cfg: Any
    ds_config: str | None = None
    resume: bool = True
    test: str | None = None
    tta: bool = False

    @property
    def watchdog(self) -> WatchdogConfig:
        """How long anything may take: the usual limits, of which mmengine's steps have none."""
        return WatchdogConfig()

    def memory_advice(self, ranks: int) -> str:
        """The keys to change where a GPU's memory is full, as what to do."""
        loader = "test_dataloader" if self.test else "train_dataloader"
        advice = f"set {loader}.batch_size lower than {self.cfg[loader]['batch_size']}"
        if self.test:
            return advice
        return f"{advice} and optim_wrapper.accumulative_counts higher, or model.backbone.grad_checkpointing=true"
