"""Frozen image tokenizers: a code from a fixed vocabulary for every patch, BEiT's target.

A tokenizer is not part of the trained model. It is deliberately not an `nn.Module`, so that a method that holds one
does not train, save or export it, and no ZeRO stage partitions it. It is identified by a SHA-256.

Shapes: B images, H x W pixels, N patches of p x p pixels, P = p*p*3, V codes.
"""

import hashlib
import pickle
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data.pixel_format import IMAGENET, Pixels
from pretrain.methods.masking import Grid
from pretrain.models.patches import normalize_patches, normalize_pixels, patchify, values_per_patch
from pretrain.trainer.run_folder import file_digest

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # their names in transformers' folders
_IMAGES_AT_ONCE = 32  # limits the memory for B * N * V distances or logits
_DALLE_PATCH = 8  # side in pixels of the square for which DALL-E's encoder gives one code
_DALLE_EPS = 0.1  # its pixels lie in 0.1..0.9: the support of the logit-Laplace distribution it was trained with


def weights_sha256(weights: str | None) -> str:
    """The digest of DALL-E's weights. Raises ValueError if there are none."""
    return file_digest(weights_file(weights))


def random_projection_sha256(seed: int, vocab_size: int, code_dim: int) -> str:
    """A digest of everything that determines a `RandomProjection`."""
    spec = f"random_projection 1: seed={seed} codes={vocab_size} dim={code_dim}"
    return hashlib.sha256(spec.encode()).hexdigest()


def weights_file(weights: str | None) -> Path:
    """The file of the weights. Raises ValueError, saying where to get one, if there is none."""
    if weights is None:
        raise ValueError(
            "target.tokenizer=dalle needs target.weights: a file or folder of FlavaImageCodebook's "
            "weights, for example the downloaded facebook/flava-image-codebook; nothing is downloaded here"
        )
    candidates = [Path(weights), *(Path(weights) / name for name in _WEIGHT_FILES)]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise ValueError(
            f"target.weights={weights!r} is neither a file nor a folder with {' or '.join(_WEIGHT_FILES)}: "
            f"download the weights of FlavaImageCodebook and give their path"
        )
    return found


class Tokenizer(ABC):
    """Computes codes of images: frozen, without gradients, in full precision whatever the engine's."""

    _device: torch.device | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, H, W, C) images -> (B, N) int64 codes of their patches in raster order."""
        if self._device != images.device:
            self._to(images.device)
            self._device = images.device
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([self._encode(part) for part in images.split(_IMAGES_AT_ONCE)])

    @abstractmethod
    def _to(self, device: torch.device) -> None: ...

    @abstractmethod
    def _encode(self, images: Tensor) -> Tensor: ...


class RandomProjection(Tokenizer):
    """BEST-RQ's quantizer (Chiu et al.) for patches: the code with the largest cosine to a fixed random projection.

    Each patch is first normalized by its own mean and variance, so that codes describe structure, not brightness. The
    numbers come from NumPy's legacy generator, whose stream never changes, and float64 keeps rounding from changing
    codes: every device gives the same ones.
    """

    def __init__(self, seed: int, vocab_size: int, code_dim: int, patch_size: int, pixels: Pixels = IMAGENET):
        rng = np.random.RandomState(seed)
        codes = torch.from_numpy(rng.standard_normal((vocab_size, code_dim)))
        self.patch_size, self.pixels = patch_size, pixels
        self.codes = F.normalize(codes, dim=1)
        num_values = values_per_patch(patch_size, pixels.channels)
        self.projection = torch.from_numpy(rng.standard_normal((num_values, code_dim)))

    def _to(self, device: torch.device) -> None:
        self.codes, self.projection = self.codes.to(device), self.projection.to(device)

    def _encode(self, images: Tensor) -> Tensor:
        patches = normalize_patches(normalize_pixels(patchify(images, self.patch_size), self.pixels).double())
        return (patches @ self.projection @ self.codes.T).argmax(-1)


class Dalle(Tokenizer):
    """DALL-E's discrete VAE encoder, BEiT's tokenizer, as transformers' `FlavaImageCodebook`.

    The image is resized to 8 pixels per patch here, on the device: the data workers are the scarcer resource, and the
    codes then belong to exactly the pixels that the model sees. (BEiT's authors resize the crop from the source image.)
    """

    def __init__(self, weights: str | None, vocab_size: int, grid: Grid):
        self.grid = grid
        self.model = _codebook(weights_file(weights), vocab_size)

    def _to(self, device: torch.device) -> None:
        self.model.to(device)

    def _encode(self, images: Tensor) -> Tensor:
        return self.model.get_codebook_indices(self._pixels(images)).flatten(1)

    def _pixels(self, images: Tensor) -> Tensor:
        """(B, 3, rows*8, cols*8) in 0.1..0.9."""
        pixels = images.permute(0, 3, 1, 2).float() / 255
        size = (self.grid[0] * _DALLE_PATCH, self.grid[1] * _DALLE_PATCH)
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        return pixels * (1 - 2 * _DALLE_EPS) + _DALLE_EPS


def _codebook(path: Path, vocab_size: int) -> Any:
    """The frozen `FlavaImageCodebook` of a weight file; its sizes are taken from the weights' shapes."""
    try:
        from transformers import FlavaImageCodebook, FlavaImageCodebookConfig
    except ImportError:
        raise ValueError(
            'target.tokenizer=dalle needs transformers: pip install "lomar-deepspeed[tokenizer]"'
        ) from None
    state = _read_weights(path)
    blocks = len({name.split(".")[3] for name in state if name.startswith("blocks.group_1.group.block_")})
    try:
        hidden_size, stored_size = len(state["blocks.input.bias"]), len(state["blocks.output.conv.bias"])
        with torch.device("meta"):  # takes no time and none of the run's random numbers
            model = FlavaImageCodebook(
                FlavaImageCodebookConfig(num_blocks_per_group=blocks, hidden_size=hidden_size, vocab_size=stored_size)
            )
        model.load_state_dict(state, assign=True)
    except (KeyError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(
            f"{path} does not contain weights of FlavaImageCodebook ({_first_line(error)}): give those of "
            f"facebook/flava-image-codebook, not those of OpenAI's package or a whole FLAVA model"
        ) from None
    if stored_size != vocab_size:
        raise ValueError(f"{path} has {stored_size} codes: set target.vocab_size={stored_size}, not {vocab_size}")
    return model.float().eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Reads tensors by name; executes no code from the file."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is not a file of plain weights, and nothing else is read: give model.safetensors, or a "
            f"pytorch_model.bin with only tensors ({_first_line(error)})"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is not a dictionary of tensors: give the weights of FlavaImageCodebook")
    return state
