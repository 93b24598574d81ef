"""The pixels that weights were trained on, and adapting weights to other pixels: ImageNet's, or our own encoder's.

Weights trained on other statistics are changed so that they compute the same: the kernel that embeds patches is linear
in the pixels, and nothing is padded. To another number of channels no change is exact, and timm's rule is followed.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from data.pixel_format import IMAGENET, Pixels
from downstream.checkpoints.files import Source

_KERNEL, _BIAS = "patch_embed.proj.weight", "patch_embed.proj.bias"


HALF = Pixels((0.5,) * 3, (0.5,) * 3)
STATISTICS = {"imagenet": IMAGENET, "half": HALF}

# The statistics of the files released for transformers' kinds of models, for folders without a record.
_BY_MODEL_TYPE = {
    "beit": HALF,
    "data2vec-vision": HALF,
    "vit_mae": IMAGENET,
    "ijepa": IMAGENET,
    "dinov2": IMAGENET,
    "deit": IMAGENET,
}


def find_pixels(source: Source, state: Mapping[str, Tensor], given: Pixels | None = None) -> tuple[Pixels, str]:
    """Finds the statistics that weights were trained on, and says how they are known.

    The record of a folder of the hub, or mmengine's configuration in the file, comes first. Without them, BEiT's own
    files have mean and deviation 0.5 (its `imagenet_default_mean_and_std` is off). BEiT v2's, whose names differ only
    in the layers that it pretrains with, have ImageNet's, as do MAE's, LoMaR's, SimMIM's, DINO's, DeiT's, I-JEPA's and
    MoCo v3's. Other files do not say, and are taken to have ImageNet's.

    Args:
        source: the file.
        state: the encoder in it, by our names.
        given: by the user; used in place of all these.
    """
    if given is not None:
        return given, f"{given} (given)"
    if source.spec is not None:
        return IMAGENET, ""
    if source.hub is not None and (recorded := source.hub.statistics):
        return _rounded(recorded), f"{_rounded(recorded)} (from the folder's records)"
    if (config := source.metadata.get("cfg")) and (found := _of_configuration(str(config))):
        return found, f"{found} (from the configuration in the file)"
    model_type = source.hub.model_type if source.hub else None
    if model_type in _BY_MODEL_TYPE:
        return _BY_MODEL_TYPE[model_type], f"{_BY_MODEL_TYPE[model_type]} (usual for transformers' {model_type})"
    if _is_beit(source, state):
        return HALF, f"{HALF} (BEiT's files; if it is BEiT v2's, export it with --pixels imagenet)"
    return IMAGENET, "ImageNet's mean and std (assumed: the file does not say)"


def fold_pixels(state: dict[str, Tensor], theirs: Pixels, ours: Pixels = IMAGENET) -> None:
    """Changes the kernel and bias that embed `theirs` to embed `ours`, in place; values are divided by their white.

    With x = s z + m for our z, W ((x - mean) / std) + b = (W s / std) z + (b + W (m - mean) / std).
    """
    kernel, bias = state[_KERNEL].double(), state[_BIAS].double()
    mean, std, m, s = (torch.tensor(values, dtype=torch.float64) for values in (*theirs[:2], *ours[:2]))
    state[_BIAS] = (bias + (kernel * ((m - mean) / std)[None, :, None, None]).sum((1, 2, 3))).float()
    state[_KERNEL] = (kernel * (s / std)[None, :, None, None]).float()


def match_pixels(state: dict[str, Tensor], theirs: Pixels, ours: Pixels) -> dict[str, str]:
    """Adapts the weights of our encoder, by our names, to other pixels, in place.

    For another number of channels this follows timm's `adapt_input_conv`, which is only defined from three: one channel
    gets the sum over all, and several get them in turn, scaled by the ratio of the two numbers.

    Returns:
        What was done to each parameter that changed.
    """
    if theirs == ours:
        return {}
    if theirs.channels == ours.channels:
        fold_pixels(state, theirs, ours)
        return dict.fromkeys((_KERNEL, _BIAS), f"computes the same from pixels with {ours} as from {theirs}")
    kernel, (before, after) = state[_KERNEL], (theirs.channels, ours.channels)
    if after == 1:
        state[_KERNEL] = kernel.sum(1, keepdim=True)
        return {_KERNEL: f"{before} -> 1 channels: summed (timm's rule)"}
    state[_KERNEL] = kernel.repeat(1, -(-after // before), 1, 1)[:, :after] * (before / after)
    return {_KERNEL: f"{before} -> {after} channels: repeated and scaled by {before}/{after} (timm's rule)"}


def _rounded(recorded: tuple[tuple[float, ...], tuple[float, ...]]) -> Pixels:
    """Recognizes ImageNet's statistics, which are written with more or fewer digits."""
    mean, std = recorded
    values, known = (*mean, *std), (*IMAGENET.mean, *IMAGENET.std)
    near = len(values) == len(known) and all(abs(a - b) < 1e-3 for a, b in zip(values, known, strict=True))
    return IMAGENET if near else Pixels(mean, std)


def _of_configuration(text: str) -> Pixels | None:
    """Mean and deviation of mmengine's `data_preprocessor`, in 0..255, if a configuration has exactly one pair."""
    numbers = r"\s*=\s*[\[(]\s*([\d.]+)\s*,\s*([\d.]+)\s*,\s*([\d.]+),?\s*[\])]"
    found = {
        tuple(tuple(float(x) / 255 for x in match) for match in pair)
        for pair in zip(re.findall(rf"\bmean{numbers}", text), re.findall(rf"\bstd{numbers}", text), strict=False)
    }
    if len(found) != 1:
        return None
    mean, std = found.pop()
    return _rounded((mean, std))


def _is_beit(source: Source, state: Mapping[str, Tensor]) -> bool:
    """Whether a file is BEiT's; SimMIM, BEiT v2 and mmselfsup share its names, so other content or the name tells."""
    biased = any(name.endswith("relative_position_bias_table") for name in state)
    simmim = "config" in source.beside or any(key.startswith(("encoder.", "neck.")) for key in source.tensors)
    second = any("cls_pt_layers" in key for key in source.tensors) or re.search(r"beit_?v2", source.path.name, re.I)
    has_names = any(key.endswith((".gamma_1", ".q_bias")) for key in source.tensors)
    return biased and has_names and not simmim and not second
