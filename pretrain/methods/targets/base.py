"""The contract of a reconstruction target.

Shapes: B images, N patches of an image, M of them predicted, P = p*p*3 values of a patch.
"""

from abc import ABC, abstractmethod

from torch import Tensor

from pretrain.trainer.schema import Section


class TargetConfig(Section):
    """The keys of a target; its `name` is a literal by which the target is chosen."""

    name: str

    def check(self, patch_size: int) -> None:
        """Raises ValueError, naming the key to change, where the target is not one of such patches."""


class PatchTarget(ABC):
    """What is predicted. No `nn.Module`: nothing in it is trained, saved, exported or partitioned.

    Attributes:
        num_outputs: values that a model predicts for each patch.
    """

    num_outputs: int

    @abstractmethod
    def ground_truth(self, images: Tensor, patches: Tensor) -> Tensor:
        """What the targets of all patches are made of, in raster order.

        Args:
            images: (B, H, W, 3) uint8.
            patches: (B, N, P) uint8, the same images as patches.

        Returns:
            (B, N, ...)
        """

    @abstractmethod
    def loss(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """The mean over all (B, M, num_outputs) predictions, in fp32; `truth` (B, M, ...) of the same patches."""

    @abstractmethod
    def render(self, prediction: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """Pixels of the predicted patches to look at, by name: (B, M, P) uint8."""


def as_sha256(key: str, given: str | None, actual: str, what: str) -> str:
    """The digest of what is used, so that a run's folder and its checkpoints name it.

    Args:
        key: the dotted key.
        given: what the configuration says, if it does.
        actual: the digest of what is there.
        what: it is, for the message.

    Raises:
        ValueError: the configuration asks for another.
    """
    if given is not None and given.lower() != actual:
        raise ValueError(
            f"{what} has the SHA-256 {actual}, not {key}={given}: give the one that was meant, or delete the key to "
            f"accept this one"
        )
    return actual
