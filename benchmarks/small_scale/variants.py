"""What is compared, and at which sizes: grids of 14x14 patches, in which LoMaR's windows of 7x7 are windows."""

from dataclasses import dataclass, field

SCRATCH = "from scratch"


@dataclass(frozen=True)
class Size:
    """An encoder and the images that it gets.

    Attributes:
        model: keys of the encoder and its images.
        dim, depth: the encoder's, from which decoders and blocks follow.
        batch, finetune_batch: images of a step.
        finetune_epochs: of 30 labeled images per class.
    """

    model: tuple[str, ...]
    dim: int
    depth: int
    batch: int
    finetune_batch: int
    finetune_epochs: int

    @property
    def late(self) -> str:
        """Mask tokens enter after two thirds of the blocks."""
        return f"method.mask_token_block={self.depth * 2 // 3}"

    @property
    def decoder(self) -> tuple[str, ...]:
        """Of two blocks and half the encoder's width: MAE's accuracy hardly depends on it (its Table 1a, b)."""
        width = self.dim // 2
        return (
            f"method.decoder_embed_dim={width}",
            "method.decoder_depth=2",
            f"method.decoder_num_heads={width // 32}",
        )


@dataclass(frozen=True)
class Variant:
    """A way to pretrain.

    Attributes:
        keys: of the configuration.
        base_lr: what tuning has found, for a batch of 256.
    """

    keys: tuple[str, ...]
    base_lr: float = field(default=1e-3)


def variants(size: Size) -> dict[str, Variant]:
    """By name, the most important ones first: where time runs out, those are there."""
    mae, lomar, sincos = ("method.name=mae", *size.decoder), ("method.name=lomar",), "model.position=sincos"
    pr_mim = ("pr_mim.throw_ratio=0.5", "pr_mim.kernel_size=7")
    return {
        "LoMaR": Variant(lomar),
        "LoMaR fast": Variant((*lomar, size.late, *pr_mim)),
        "MAE": Variant((*mae, sincos)),
        "MAE + LUT": Variant((*mae, sincos, f"lut.hidden_dim={4 * size.dim}", "lut.alpha=1.0", "data.crop=simple")),
    }
