"""Tiny encoders under the name of a known size, ours and timm's."""

import functools
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import timm
from helpers.originals import TINY
from timm.models import _registry

from pretrain.models.vit import ARCHS


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    name = "vit_tiny_patch16_224"
    theirs = functools.partial(
        timm.models.model_entrypoint(name), embed_dim=TINY.dim, depth=TINY.depth, num_heads=TINY.heads
    )
    with patch.dict(ARCHS, vit_tiny=TINY), patch.dict(_registry._model_entrypoints, {name: theirs}):
        yield
