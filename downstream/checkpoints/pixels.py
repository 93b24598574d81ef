"""The pixels that weights were trained on, and how they become those of another encoder: ImageNet's, but for our own.

Weights trained on other statistics are changed so that they compute the same: the kernel that embeds patches is linear
in the pixels, and nothing is padded. Between numbers of channels nothing is the same, and timm's rule is followed.
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

# Where no record tells: transformers' kind of model, as its released files are.
_BY_MODEL_TYPE = {
    "beit": HALF,
    "data2vec-vision": HALF,
    "vit_mae": IMAGENET,
    "ijepa": IMAGENET,
    "dinov2": IMAGENET,
    "deit": IMAGENET,
}


def find_pixels(source: Source, state: Mapping[str, Tensor], given: Pixels | None = None) -> tuple[Pixels, str]:
    """The statistics that weights were trained on, and how they are known, in words.

    What a folder of the hub or mmengine's configuration in the file says counts first. Without it, BEiT's own files are
    of mean and deviation 0.5 (its `imagenet_default_mean_and_std` is off), those of BEiT v2, whose names are the same
    but for the layers that it pretrains with, are ImageNet's, as are MAE's, LoMaR's, SimMIM's, DINO's, DeiT's, I-JEPA's
    and MoCo v3's. Other files do not say, and are taken to be ImageNet's.

    Args:
        source: the file.
        state: the encoder in it, by our names.
        given: by the user, who knows better.
    """
    if given is not None:
        return given, f"{given} (given)"
    if source.spec is not None:
        return IMAGENET, ""
    if source.hub is not None and (recorded := source.hub.statistics):
        return _rounded(recorded), f"{_rounded(recorded)} (of the folder's records)"
    if (config := source.metadata.get("cfg")) and (found := _of_configuration(str(config))):
        return found, f"{found} (of the configuration in the file)"
    model_type = source.hub.model_type if source.hub else None
    if model_type in _BY_MODEL_TYPE:
        return _BY_MODEL_TYPE[model_type], f"{_BY_MODEL_TYPE[model_type]} (transformers' {model_type} usually)"
    if _is_beit(source, state):
        return HALF, f"{HALF} (BEiT's files; if it is of BEiT v2, export it with --pixels imagenet)"
    return IMAGENET, "ImageNet's mean and deviation (assumed: the file does not say)"


def fold_pixels(state: dict[str, Tensor], theirs: Pixels, ours: Pixels = IMAGENET) -> None:
    """Makes the kernel and bias that embed pixels of `theirs` those that embed `ours`, in place; values by their white.

    With x = s z + m of our z, W ((x - mean) / std) + b = (W s / std) z + (b + W (m - mean) / std).
    """
    kernel, bias = state[_KERNEL].double(), state[_BIAS].double()
    mean, std, m, s = (torch.tensor(values, dtype=torch.float64) for values in (*theirs[:2], *ours[:2]))
    state[_BIAS] = (bias + (kernel * ((m - mean) / std)[None, :, None, None]).sum((1, 2, 3))).float()
    state[_KERNEL] = (kernel * (s / std)[None, :, None, None]).float()


def match_pixels(state: dict[str, Tensor], theirs: Pixels, ours: Pixels) -> dict[str, str]:
    """Makes weights of an encoder of ours, by our names, those for other pixels, in place.

    Of another number of channels they are those of timm's `adapt_input_conv`, which is defined from three alone: one
    channel gets the sum over all, and several get them in turn, scaled by the ratio of the two numbers.

    Returns:
        What became of which parameter of the state.
    """
    if theirs == ours:
        return {}
    if theirs.channels == ours.channels:
        fold_pixels(state, theirs, ours)
        return dict.fromkeys((_KERNEL, _BIAS), f"computes the same of pixels of {ours} as of {theirs}")
    kernel, (before, after) = state[_KERNEL], (theirs.channels, ours.channels)
    if after == 1:
        state[_KERNEL] = kernel.sum(1, keepdim=True)
        return {_KERNEL: f"{before} -> 1 channels: the sum over them (timm's rule)"}
    state[_KERNEL] = kernel.repeat(1, -(-after // before), 1, 1)[:, :after] * (before / after)
    return {_KERNEL: f"{before} -> {after} channels: repeated and scaled by {before}/{after} (timm's rule)"}


def _rounded(recorded: tuple[tuple[float, ...], tuple[float, ...]]) -> Pixels:
    """ImageNet's statistics are written with more or fewer digits."""
    mean, std = recorded
    values, known = (*mean, *std), (*IMAGENET.mean, *IMAGENET.std)
    near = len(values) == len(known) and all(abs(a - b) < 1e-3 for a, b in zip(values, known, strict=True))
    return IMAGENET if near else Pixels(mean, std)


def _of_configuration(text: str) -> Pixels | None:
    """Mean and deviation of mmengine's `data_preprocessor`, in 0..255, where a configuration has one pair."""
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
    """BEiT's names are SimMIM's, BEiT v2's and mmselfsup's too: what else is in the file, or its name, tells."""
    biased = any(name.endswith("relative_position_bias_table") for name in state)
    simmim = "config" in source.beside or any(key.startswith(("encoder.", "neck.")) for key in source.tensors)
    second = any("cls_pt_layers" in key for key in source.tensors) or re.search(r"beit_?v2", source.path.name, re.I)
    has_names = any(key.endswith((".gamma_1", ".q_bias")) for key in source.tensors)
    return biased and has_names and not simmim and not second
