"""Shrinks our and timm's vit_tiny in the tests of every folder whose conftest imports `tiny_archs`."""

import functools
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import timm
from timm.models import _registry

from helpers.originals import TINY
from pretrain.models.vit import ARCHS


@pytest.fixture(autouse=True)
def tiny_archs() -> Iterator[None]:
    """Give `vit_tiny` and timm's `vit_tiny_patch16_224` the size of `originals.TINY`."""
    name = "vit_tiny_patch16_224"
    tiny = functools.partial(
        timm.models.model_entrypoint(name), embed_dim=TINY.dim, depth=TINY.depth, num_heads=TINY.heads
    )
    with patch.dict(ARCHS, vit_tiny=TINY), patch.dict(_registry._model_entrypoints, {name: tiny}):
        yield
