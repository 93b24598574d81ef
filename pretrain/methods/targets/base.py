"""The interface of a reconstruction target.

Shapes: B images, N patches of an image, M of them predicted, P = p*p*C values of a patch.
"""

from abc import ABC, abstractmethod

from torch import Tensor

from data.pixel_format import Pixels
from pretrain.methods.masking import Grid
from pretrain.trainer.config import ModelConfig
from pretrain.trainer.schema import Section


class TargetConfig(Section):
    """The keys of a target; `name` is a literal that selects the target."""

    name: str

    def check(self, grid: Grid, model: ModelConfig) -> None:
        """Raises ValueError, naming the key to change, if the target does not fit the image's grid or the encoder."""

    def check_pixels(self, pixels: Pixels) -> None:
        """Raises ValueError if the target does not support such pixels; by default it supports all."""

    def refuse_pixels(self, what: str, pixels: Pixels) -> None:
        """Raises the ValueError of a target for photographs only; `what` describes what the target needs."""
        raise ValueError(
            f"target.name={self.name} {what}, not data.channels={pixels.channels} data.dtype={pixels.dtype} with this "
            f"data.mean and data.std: set target.name=pixels"
        )


class PatchTarget(ABC):
    """The quantity to predict. Not an `nn.Module`: nothing in it is trained, saved, exported or partitioned.

    Attributes:
        num_outputs: number of values to predict for each patch.
        caption: what a viewer of the images of `render` must know, if anything.
    """

    num_outputs: int
    caption: str = ""

    @abstractmethod
    def ground_truth(self, images: Tensor, patches: Tensor) -> Tensor:
        """The data from which `loss` computes the targets of all patches, in raster order.

        Args:
            images: (B, H, W, C), uint8 or `computable`.
            patches: (B, N, P), the same images as patches.

        Returns:
            (B, N, ...)
        """

    @abstractmethod
    def loss(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """The mean over all (B, M, num_outputs) predictions, in fp32; `truth` (B, M, ...) is for the same patches."""

    def losses(self, prediction: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """`loss` and, if it is a sum, its terms `loss_*`, detached, to be logged."""
        return {"loss": self.loss(prediction, truth)}

    @abstractmethod
    def render(self, prediction: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """Pixels of the predicted patches for display, by name: (B, M, p*p*3) uint8."""


def as_sha256(key: str, given: str | None, actual: str, what: str) -> str:
    """Checks a configured SHA-256 and returns the actual one, which a run's folder and checkpoints then record.

    Args:
        key: the dotted key.
        given: the configured digest, if any.
        actual: the digest of the file or tokenizer.
        what: its name, for the message.

    Raises:
        ValueError: the two differ.
    """
    if given is not None and given.lower() != actual:
        raise ValueError(
            f"{what} has the SHA-256 {actual}, not {key}={given}: use the intended one, or delete the key to "
            f"accept this one"
        )
    return actual
