"""The principal components of patches: a small file that `python -m pretrain.fit_pca` makes out of shards.

They are found once and not during training, so that no run depends on when or by how many ranks they were found. Like a
tokenizer, they are named by the SHA-256 of their file.
"""

import hashlib
from pathlib import Path

import torch
from pydantic import Field, ValidationInfo, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pretrain.schema import Section


class PCAConfig(Section):
    """Which components; after reading, `sha256` is always that of the file."""

    file: str = Field(description="what `python -m pretrain.fit_pca SHARDS FILE` wrote")
    sha256: str | None = Field(None, description="refuse any other file; unset, it is filled in")

    @field_validator("file")
    @classmethod
    def _exists(cls, file: str) -> str:
        if not Path(file).is_file():
            raise ValueError(
                f"method.pca.file={file!r} is no file: make it with `python -m pretrain.fit_pca SHARDS FILE`"
            )
        return file

    @field_validator("sha256")
    @classmethod
    def _is_of_the_file(cls, given: str | None, info: ValidationInfo) -> str | None:
        if "file" not in info.data:
            return given  # it is wrong, and said to be
        actual = hashlib.sha256(Path(info.data["file"]).read_bytes()).hexdigest()
        if given is not None and given.lower() != actual:
            raise ValueError(
                f"the components are not those of method.pca.sha256={given}: the digest of {info.data['file']} is "
                f"{actual}; give the file that was meant, or delete the key to accept this one"
            )
        return actual


def read_basis(file: str, patch: int) -> tuple[Tensor, Tensor]:
    """The mean (P,) and the components (K, P), largest variance first, of standardised patches.

    Raises:
        ValueError: another kind of file, or components of patches of another size.
    """
    try:
        basis = load_file(file)
        mean, components = basis["mean"], basis["components"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"method.pca.file={file!r} holds no components ({error}): make it with "
            f"`python -m pretrain.fit_pca SHARDS FILE`"
        ) from None
    values = patch**2 * 3
    if len(mean) != values:
        raise ValueError(
            f"method.pca.file={file!r} is of patches of {len(mean)} values, and model.patch={patch} has {values}: "
            f"make one with `python -m pretrain.fit_pca SHARDS FILE --patch {patch}`"
        )
    return mean, components


def principal_components(covariance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The eigenvectors of the largest eigenvalues, each with its largest entry positive: a sign means nothing.

    Args:
        covariance: (P, P) float64, symmetric.
        count: how many, K.

    Returns:
        Components (K, P), orthonormal, and their variances (K,), largest first.
    """
    variances, vectors = torch.linalg.eigh(covariance)
    components = vectors.flip(1)[:, :count].T
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return components * largest.sign(), variances.flip(0)[:count]
