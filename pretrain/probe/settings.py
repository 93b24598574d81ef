"""What to measure of an encoder: the keys that a run's `probe.*` and `downstream.classify.probe` share."""

from typing import Literal

from pydantic import Field

from pretrain.trainer.schema import Section

Pool = Literal["mean", "class", "class_mean", "prefix"]


class ProbeSettings(Section):
    """Which features, and how they are judged. Only numbers of equal settings can be compared."""

    k: int = Field(20, ge=1, description="neighbors that vote in k-NN")
    pool: Pool = Field(
        "mean",
        description="what k-NN and ridge regression see of an image: mean of the patch tokens, class token, both side "
        "by side (class_mean), or the mean of all tokens in front of the patches (prefix: class token and registers)",
    )
    block: tuple[int, ...] = Field(
        (),
        description="the blocks whose outputs are the features, side by side, 1 is the first; unless set, the "
        "encoder's output. Fine-tuning always takes the output",
    )
    attentive_steps: int = Field(500, ge=0, description="steps by which the attentive probe is trained; 0: none")
    finetune_epochs: int = Field(
        0, ge=0, description="epochs by which a copy of the encoder is fine-tuned: costs as many of training; 0: not"
    )
    max_images: int = Field(
        10_000,
        ge=1,
        description="images of the training set that the attentive probe and fine-tuning learn from, at most; their "
        "patch tokens and pixels are kept in memory, divided over the ranks",
    )
