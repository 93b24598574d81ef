"""The compared variants and sizes: grids of 14x14 patches, large enough for LoMaR's 7x7 windows to be windows."""

import re
from dataclasses import dataclass, field

SCRATCH = "from scratch"


@dataclass(frozen=True)
class Size:
    """An encoder and its images.

    Attributes:
        model: keys of the encoder and its images.
        patch: side of a patch in pixels.
        dim, depth: the encoder's; they determine decoders and blocks.
        batch, finetune_batch: images per step.
        finetune_epochs: with 30 labeled images per class.
    """

    model: tuple[str, ...]
    patch: int
    dim: int
    depth: int
    batch: int
    finetune_batch: int
    finetune_epochs: int

    @property
    def late(self) -> str:
        """Key that lets mask tokens enter after two thirds of the blocks."""
        return f"method.mask_token_block={self.depth * 2 // 3}"

    @property
    def decoder(self) -> tuple[str, ...]:
        """Two blocks of half the encoder's width; MAE's accuracy hardly depends on it (its Table 1a, b)."""
        width = self.dim // 2
        return (
            f"method.decoder_embed_dim={width}",
            "method.decoder_depth=2",
            f"method.decoder_num_heads={width // 32}",
        )

    @property
    def small_decoder(self) -> tuple[str, ...]:
        """One block of a third of the encoder's width; LocalMIM has such a decoder behind each of several blocks."""
        return (
            f"method.decoder_embed_dim={self.dim // 3 // 32 * 32 or 32}",
            "method.decoder_depth=1",
            "method.decoder_num_heads=2",
        )

    @property
    def half_patch(self) -> str:
        """Histogram cells, 2 x 2 per patch."""
        return f"target.cell_sizes=[{self.patch // 2}]"

    def cells(self, count: int) -> tuple[str, ...]:
        """Cells as in LocalMIM: fine ones behind shallow blocks, coarse ones behind deep blocks."""
        blocks = [2, 4, self.depth - 2, self.depth] if count == 4 else [2, 4, self.depth]
        sizes = [self.patch // 4, self.patch // 2, self.patch, 2 * self.patch][:count]
        return f"method.blocks={blocks}", "target.name=hog", f"target.cell_sizes={sizes}"

    @property
    def fused(self) -> list[int]:
        """MFF's six of twelve blocks, scaled to this depth."""
        return [round(block * self.depth / 12) for block in (1.5, 3, 5, 7, 9, 12)]


@dataclass(frozen=True)
class Variant:
    """A way to pretrain.

    Attributes:
        keys: of the configuration.
        base_lr: found by tuning, for a batch of 256.
    """

    keys: tuple[str, ...]
    base_lr: float = field(default=1e-3)


def label(name: str) -> str:
    """A variant's name for its run's folder."""
    return "_".join(re.findall(r"\w+", name.lower()))


def variants(size: Size) -> dict[str, Variant]:
    """The variants by name, the most important first, so that these exist if time runs out."""
    sincos, hog = "model.position=sincos", "target.name=hog"
    mae = ("method.name=mae", *size.decoder, sincos)
    lomar, pr_mim = "method.name=lomar", ("pr_mim.throw_ratio=0.5", "pr_mim.kernel_size=7")
    asymmetric = (lomar, "method.architecture=asymmetric", *size.decoder)
    cross = (*asymmetric, "method.decoder=cross", hog, size.half_patch)
    multiscale = (lomar, "method.architecture=multiscale", *size.small_decoder, *size.cells(3))
    large_window = ("method.num_windows=1", "method.window_size=10", "method.mask_ratio=0.75")
    return {
        "MAE": Variant(mae),
        "LoMaR": Variant((lomar,)),
        "LoMaR fast": Variant((lomar, size.late, *pr_mim)),
        "LocalMIM": Variant(("method.name=local_mim", *size.small_decoder, *size.cells(4), sincos)),
        "LoMaR multiscale": Variant(multiscale),
        "LoMaR cross": Variant(cross),
        "LoMaR next": Variant((*cross, sincos)),
        "LoMaR, one large window": Variant((*large_window, *multiscale)),
        "LoMaR, one large window, sin-cos": Variant((*large_window, *multiscale, sincos)),
        "MFF": Variant(("method.name=mff", f"method.blocks={size.fused}", *size.decoder, sincos)),
        "MAE + LUT": Variant((*mae, f"lut.hidden_dim={4 * size.dim}", "lut.alpha=1.0", "data.crop=simple")),
    }
