"""What to measure of an encoder: the keys that a run's `probe.*` and `downstream.classify.probe` share."""

from typing import Literal

from pydantic import Field

from pretrain.trainer.schema import Section

Pool = Literal["mean", "class", "class_mean", "prefix"]


class ProbeSettings(Section):
    """Which features are judged, and how. Only numbers from equal settings can be compared."""

    k: int = Field(20, ge=1, description="neighbors that vote in k-NN")
    pool: Pool = Field(
        "mean",
        description="what k-NN and ridge regression see of an image: mean of the patch tokens, class token, both "
        "concatenated (class_mean), or the mean of all tokens before the patches (prefix: class token and registers)",
    )
    block: tuple[int, ...] = Field(
        (),
        description="blocks whose outputs are concatenated as features; 1 is the first; unset: the encoder's output, "
        "which fine-tuning always uses",
    )
    attentive_steps: int = Field(500, ge=0, description="training steps of the attentive probe; 0: no such probe")
    finetune_epochs: int = Field(
        0, ge=0, description="epochs of fine-tuning a copy of the encoder, each as costly as one of training; 0: none"
    )
    max_images: int = Field(
        10_000,
        ge=1,
        description="most training images that the attentive probe and fine-tuning learn from; their patch tokens and "
        "pixels are kept in memory, divided among the ranks",
    )
